//! Stands in for the devices of candle in a program without them.

use engine::EngineConfig;
use trainer::RlConfig;

use crate::args::GenerateArgs;
use crate::device;
use crate::exit::Result;
use crate::terminal::Terminal;

/// Refuses.
pub(crate) fn generate(name: &str, _: &GenerateArgs, _: &Terminal) -> Result<()> {
    Err(device::missing(name))
}

/// Refuses.
pub(crate) fn rl(name: &str, _: &RlConfig, _: &EngineConfig, _: &Terminal) -> Result<()> {
    Err(device::missing(name))
}
