use crate::*;
pub struct Launch<'a> { pub buffers: &'a [HostBuffer], pub info: &'a [u8], pub dynamic: usize, pub seed: u64, pub watched: bool }
pub fn execute(_l: &Launch, _r: &mut LaunchReport) -> Result<()> { Ok(()) }
