//! A writer of small files, and what the reader makes of whole, cut and damaged ones.

use super::*;
use crate::error::ErrorKind;

/// Builds the bytes of a GGUF file.
pub(crate) struct Builder {
    version: u32,
    metadata: Vec<u8>,
    pairs: u64,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { version: 3, metadata: Vec::new(), pairs: 0, tensors: Vec::new() }
    }

    /// A pair with its value already encoded.
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.pairs += 1;
        self
    }

    pub(crate) fn number(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn float(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.raw(key, 8, &bytes)
    }

    pub(crate) fn strings(self, key: &str, values: &[String]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| text(&mut bytes, v));
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn integers(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.raw(key, 9, &bytes)
    }

    /// Dimensions innermost first, as the file has them.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), kind, data));
        self
    }

    pub(crate) fn f32(self, name: &str, dims: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, dims, 0, data)
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pairs.to_le_bytes());
        out.extend(&self.metadata);
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        if let Some((_, _, _, last)) = self.tensors.last() {
            data.truncate(data.len() - (last.len().next_multiple_of(32) - last.len()));
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

fn read(bytes: Vec<u8>) -> Result<Gguf> {
    Gguf::from_bytes(Bytes::memory("test.gguf", bytes.into()))
}

fn sample() -> Builder {
    Builder::new()
        .raw("u8", 0, &[200])
        .raw("i8", 1, &[0xff])
        .raw("i64", 11, &(-5i64).to_le_bytes())
        .raw("f64", 12, &0.25f64.to_le_bytes())
        .raw("yes", 7, &[1])
        .string("name", "héllo")
        .strings("tokens", &["a".into(), "b c".into()])
        .raw("ints", 9, &[5, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])
        .f32("v", &[3], &[1.0, 2.0, 3.0])
        .f32("m", &[2, 3], &[0.0, 1.0, 10.0, 11.0, 20.0, 21.0])
}

#[test]
fn values_and_weights_are_read() {
    for version in [2, 3] {
        let file = read(Builder { version, ..sample() }.build()).unwrap();
        assert_eq!(file.unsigned("u8"), Some(200));
        assert_eq!(file.metadata("i8"), Some(&Value::Signed(-1)));
        assert_eq!((file.float("i64"), file.float("f64")), (Some(-5.0), Some(0.25)));
        assert_eq!(file.boolean("yes"), Some(true));
        assert_eq!(file.string("name"), Some("héllo"));
        assert_eq!(file.strings("tokens").unwrap(), ["a", "b c"]);
        assert_eq!(file.integers("ints").unwrap(), [1, -1]);
        assert_eq!(file.shape("m"), Some(&[3, 2][..]));
        let mut rows = [0.0; 4];
        file.read_rows("m", 1..3, &mut rows).unwrap();
        assert_eq!(rows, [10.0, 11.0, 20.0, 21.0]);
        let mut row = [0.0; 3];
        file.read_rows("v", 0..1, &mut row).unwrap();
        assert_eq!(row, [1.0, 2.0, 3.0]);
        assert!(file.read_rows("m", 2..4, &mut rows).is_err());
        assert!(file.read_rows("x", 0..1, &mut row).is_err());
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample().build();
    for n in 0..bytes.len() {
        let error = read(bytes[..n].to_vec()).expect_err("a shorter file").to_string();
        assert!(error.contains("truncated") || error.contains("not a gguf file"), "{n}: {error}");
    }
    assert!(read(bytes).is_ok());
}

fn refused(builder: Builder, part: &str) {
    let error = read(builder.build()).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn hostile_files_are_refused_with_a_reason() {
    refused(Builder { version: 1, ..sample() }, "gguf version 1");
    refused(Builder { version: 3 << 24, ..sample() }, "big-endian");
    refused(Builder { pairs: 1 << 63, ..sample() }, "metadata pairs");
    refused(sample().raw("s", 8, &u64::MAX.to_le_bytes()), "bytes of text");
    let mut huge = 8u32.to_le_bytes().to_vec();
    huge.extend((1u64 << 61).to_le_bytes());
    refused(sample().raw("a", 9, &huge), "array elements");
    let mut nested = Vec::new();
    for _ in 0..9 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    refused(sample().raw("deep", 9, &nested), "nested deeper than 4");
    refused(sample().string("name", "again"), "appears twice");
    refused(sample().raw("t", 77, &[]), "unknown metadata type 77");
    refused(sample().raw("b", 7, &[2]), "truth value is 2");
    refused(sample().number("general.alignment", 0), "general.alignment");
    refused(sample().number("general.alignment", 24), "general.alignment");
    refused(sample().f32("v", &[1], &[0.0]), "appears twice");
    refused(sample().f32("big", &[1 << 39, 1 << 39], &[]), "does not fit");
    refused(sample().f32("none", &[0], &[]), "dimension of 0");
    refused(sample().tensor("q", &[33], 2, vec![0; 36]), "does not fit Q4_0");
    refused(sample().tensor("iq", &[256], 20, vec![0; 200]), "ggml type 20, supported are F32");
    let error = read(sample().tensor("iq", &[256], 20, vec![]).build()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)));
}

#[test]
fn overlapping_weights_are_refused() {
    let mut bytes = sample().build();
    // The second description ends the header; its offset of 32 is the last u64 before the padding.
    let at = bytes.windows(8).rposition(|w| w == 32u64.to_le_bytes()).unwrap();
    bytes[at] = 0;
    let error = read(bytes).unwrap_err().to_string();
    assert!(error.contains("overlap"), "{error}");
}

#[test]
fn split_files_name_their_parts() {
    let path = Path::new("d/m-00001-of-00003.gguf");
    assert_eq!(part_path(path, 2, 3).unwrap(), Path::new("d/m-00003-of-00003.gguf"));
    assert!(part_path(Path::new("d/m-00002-of-00003.gguf"), 1, 3).is_err());
    assert!(part_path(path, 1, 1 << 40).is_err());
}

#[test]
fn the_largest_token_id_means_none() {
    let vocab = |name: &str, id: u32| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let file = Builder::new().string("tokenizer.ggml.model", "gpt2").number(&key, id);
        crate::text::GgufVocab::read(&read(file.build()).unwrap()).unwrap()
    };
    assert_eq!((vocab("padding", u32::MAX).pad, vocab("bos", u32::MAX).bos), (None, None));
    assert_eq!((vocab("padding", 999).pad, vocab("bos", 7).bos), (Some(999), Some(7)));
}
