//! What computes: this project's kernels, or candle where it is compiled in.

use crate::args::DeviceArg;
use crate::exit::{Failure, Result};

/// Fails when `device` is not part of this program.
pub(crate) fn check(device: DeviceArg) -> Result<()> {
    match device {
        DeviceArg::Cpu => Ok(()),
        DeviceArg::CandleCpu if cfg!(feature = "candle") => Ok(()),
        DeviceArg::CandleCpu => Err(Failure::usage(
            "--device candle-cpu is not part of this program, \
             build it with cargo build --release --features candle",
        )),
    }
}
