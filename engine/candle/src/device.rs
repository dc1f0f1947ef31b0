//! Candle devices by name.

use candle_core::Device;
use engine::{Error, Result};

/// The device of this name: `candle-cpu`, and with the feature `cuda` also `cuda` (device 0) or `cuda:N`.
///
/// ```
/// assert!(candle_backend::device("candle-cpu")?.is_cpu());
/// let error = candle_backend::device("tpu").unwrap_err();
/// assert_eq!(error.to_string(), "device is \"tpu\", limit is one of candle-cpu, cuda, cuda:N");
/// # Ok::<(), engine::Error>(())
/// ```
///
/// # Errors
/// `ErrorKind::Config` for an unknown name; `ErrorKind::Unsupported` for a CUDA device that this build or
/// this machine does not have.
pub fn device(name: &str) -> Result<Device> {
    if name == "candle-cpu" {
        return Ok(Device::Cpu);
    }
    let ordinal = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|number| number.parse().ok()),
        None => None,
    };
    let unknown =
        || Error::config(format!("device is {name:?}, limit is one of candle-cpu, cuda, cuda:N"));
    cuda(name, ordinal.ok_or_else(unknown)?)
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, ordinal: usize) -> Result<Device> {
    Device::new_cuda(ordinal).map_err(|error| {
        let text = error.to_string();
        Error::unsupported(format!("device {name}: {}", text.lines().next().unwrap_or_default()))
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _ordinal: usize) -> Result<Device> {
    Err(Error::unsupported(format!("device {name} needs a build with the feature `cuda`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_names_are_refused_with_the_good_ones() {
        for name in ["", "cpu", "cuda:", "cuda:x", "cuda:-1", "cuda0", "CUDA"] {
            let error = device(name).expect_err("not a device").to_string();
            assert!(error.contains("candle-cpu, cuda, cuda:N"), "{name}: {error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_names_the_feature_it_needs() {
        let error = device("cuda:1").expect_err("no such device in this build");
        assert_eq!(error.to_string(), "device cuda:1 needs a build with the feature `cuda`");
    }
}
