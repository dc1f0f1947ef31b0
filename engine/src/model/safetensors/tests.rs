//! Round trips, sharded models, and damaged headers.

use super::*;
use crate::model::source::tests::scratch;

fn specs() -> Vec<TensorSpec> {
    let spec = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), shape: shape.into() };
    vec![spec("b", &[3, 2]), spec("a", &[4])]
}

#[test]
fn written_files_read_back() {
    let dir = scratch("safetensors-round");
    let path = dir.path.join("m.safetensors");
    let values: Vec<f32> = (0..10).map(|i| i as f32 * 1.001).collect();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut writer = Writer::create(&path, &specs(), dtype).unwrap();
        writer.append(&values[..7]).unwrap();
        writer.append(&values[7..]).unwrap();
        writer.finish().unwrap();
        let stored = |v: &f32| match dtype {
            Dtype::F32 => *v,
            Dtype::Bf16 => half::bf16::from_f32(*v).to_f32(),
        };
        let expected: Vec<f32> = values.iter().map(stored).collect();
        let file = SafeTensors::open(&path).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(file.shape("b"), Some(&[3, 2][..]));
        let (mut b, mut a) = ([0.0; 4], [0.0; 4]);
        file.read_rows("b", 1..3, &mut b).unwrap();
        file.read_rows("a", 0..1, &mut a).unwrap();
        assert_eq!((&b[..], &a[..]), (&expected[2..6], &expected[6..]));
    }
    let raw = std::fs::read(&path).unwrap();
    assert!(raw[8..].starts_with(br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16""#));
    assert_eq!(u64::from_le_bytes(raw[..8].try_into().unwrap()) % 8, 0);
}

#[test]
fn an_abandoned_writer_leaves_nothing() {
    let dir = scratch("safetensors-drop");
    let path = dir.path.join("m.safetensors");
    let mut writer = Writer::create(&path, &specs(), Dtype::F32).unwrap();
    writer.append(&[1.0]).unwrap();
    assert_eq!(std::fs::read_dir(&dir.path).unwrap().count(), 1);
    assert!(!path.exists());
    drop(writer);
    assert_eq!(std::fs::read_dir(&dir.path).unwrap().count(), 0);
    assert!(Writer::create(&dir.path.join("no/such.safetensors"), &specs(), Dtype::F32).is_err());
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

fn refused(bytes: Vec<u8>, part: &str) {
    let error = SafeTensors::from_memory("m", bytes).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn damaged_headers_are_refused_with_a_reason() {
    let good = r#"{"__metadata__":{"shape":"x"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},
        "i":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#;
    let read = SafeTensors::from_memory("m", file(good, 16)).unwrap();
    assert_eq!(read.names().collect::<Vec<_>>(), ["a"]);
    let complex = good.replace("I64", "C64");
    let read = SafeTensors::from_memory("m", file(&complex, 16)).unwrap();
    assert_eq!(read.names().collect::<Vec<_>>(), ["a"]);
    refused(file(good, 15), "truncated");
    refused(file(good, 17), "1 bytes after the last tensor");
    refused(vec![0; 4], "not safetensors");
    refused(u64::MAX.to_le_bytes().to_vec(), "header of 18446744073709551615 bytes");
    refused(1000u64.to_le_bytes().to_vec(), "truncated");
    refused(file("[1]", 0), "malformed");
    let one = |entry: &str| file(&format!("{{\"a\":{entry}}}"), 8);
    refused(one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "does not fit");
    refused(one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), "does not fit");
    refused(one(r#"{"dtype":"F99","shape":[2],"data_offsets":[0,8]}"#), "does not fit");
    let huge = "4611686018427387904";
    let shape = format!(r#"{{"dtype":"F32","shape":[{huge},{huge},0],"data_offsets":[0,0]}}"#);
    refused(one(&shape), "does not fit");
    let pair = |x: &str, y: &str, data| {
        let t = |n, at| format!(r#""{n}":{{"dtype":"F32","shape":[1],"data_offsets":[{at}]}}"#);
        file(&format!("{{{},{}}}", t("a", x), t("b", y)), data)
    };
    refused(pair("0,4", "2,6", 6), "overlap");
    refused(pair("0,4", "6,10", 10), "2 unused bytes");
    refused(
        file(
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
        ),
        "appears twice",
    );
}

#[test]
fn shards_are_found_through_their_index() {
    let dir = scratch("safetensors-shards");
    for (name, spec) in ["1.safetensors", "2.safetensors"].into_iter().zip(specs()) {
        let mut writer =
            Writer::create(&dir.path.join(name), std::slice::from_ref(&spec), Dtype::F32).unwrap();
        writer.append(&vec![spec.shape.len() as f32; spec.elements() as usize]).unwrap();
        writer.finish().unwrap();
    }
    let index = dir.path.join("model.safetensors.index.json");
    let write = |a: &str, b: &str| {
        let map = serde_json::json!({"metadata": {}, "weight_map": {"a": a, "b": b}});
        std::fs::write(&index, map.to_string()).unwrap();
    };
    write("2.safetensors", "1.safetensors");
    let model = SafeTensors::open_index(&index).unwrap();
    let mut row = [0.0; 4];
    model.read_rows("a", 0..1, &mut row).unwrap();
    assert_eq!(row, [1.0; 4]);
    let refused = |part: &str| {
        let error = SafeTensors::open_index(&index).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    write("1.safetensors", "1.safetensors");
    refused("tensor \"a\" is not in \"1.safetensors\"");
    write("2.safetensors", "3.safetensors");
    refused("3.safetensors");
    write("2.safetensors", "../1.safetensors");
    refused("is not the name of a safetensors file beside the index");
}
