//! What computes: this project's kernels, or candle where it is compiled in.

use crate::exit::Failure;

/// `--device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// This project's kernels.
    Cpu,
    /// A device of candle, by name.
    Candle(String),
}

/// Reads a value of `--device`.
pub(crate) fn parse(text: &str) -> Result<DeviceArg, String> {
    let ordinal = text.strip_prefix("cuda:").map(str::parse::<u16>);
    match (text, ordinal) {
        ("cpu", _) => Ok(DeviceArg::Cpu),
        ("candle-cpu" | "cuda", _) | (_, Some(Ok(_))) => Ok(DeviceArg::Candle(text.to_owned())),
        _ => Err("expected cpu, candle-cpu, cuda or cuda:N".to_owned()),
    }
}

/// The failure for a device that was not compiled in.
pub(crate) fn missing(name: &str) -> Failure {
    let feature = if name == "candle-cpu" { "candle" } else { "cuda" };
    Failure::usage(format!(
        "--device {name} is not part of this program, \
         build it with cargo build --release --features {feature}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_others_refused() {
        assert_eq!(parse("cpu"), Ok(DeviceArg::Cpu));
        for name in ["candle-cpu", "cuda", "cuda:0", "cuda:13"] {
            assert_eq!(parse(name), Ok(DeviceArg::Candle(name.to_owned())));
        }
        for name in ["", "candle", "cuda:", "cuda:x", "cuda:-1", "cuda0", "CPU"] {
            assert!(parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_missing_device_names_its_feature() {
        for (name, feature) in [("candle-cpu", "--features candle"), ("cuda:1", "--features cuda")]
        {
            let failure = missing(name).to_string();
            assert!(failure.ends_with(feature) && failure.contains(name), "{failure}");
        }
    }
}
