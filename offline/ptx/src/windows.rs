//! Generic addresses (section 5.4): each space has a window of them, and in it lies at the offset that its own addresses have. Global
//! addresses are generic as they are.

use crate::operand::Space;

/// Addresses that generic ones are made of: what is added to an offset in shared, local, parameter and module memory.
pub const SHARED_WINDOW: u64 = 1 << 60;
/// See [`SHARED_WINDOW`].
pub const LOCAL_WINDOW: u64 = 2 << 60;
/// See [`SHARED_WINDOW`].
pub const PARAMETER_WINDOW: u64 = 3 << 60;
/// See [`SHARED_WINDOW`]. Global addresses are generic: what the module names lies here, above all buffers.
pub const MODULE_WINDOW: u64 = 4 << 60;

/// Whether a generic address lies in a space. Constants have no generic addresses here: `cvta.const` is not known.
pub fn is_within(space: Space, address: u64) -> bool {
    match space {
        Space::Shared => (SHARED_WINDOW..LOCAL_WINDOW).contains(&address),
        Space::Local => (LOCAL_WINDOW..PARAMETER_WINDOW).contains(&address),
        Space::Parameter => (PARAMETER_WINDOW..MODULE_WINDOW).contains(&address),
        Space::Global | Space::Generic => !(SHARED_WINDOW..MODULE_WINDOW).contains(&address),
        Space::Constant => false,
    }
}

/// Where in shared memory an address of a space lies, if it lies there.
pub fn shared_offset(space: Space, address: u64) -> Option<u64> {
    match space {
        Space::Shared => Some(address),
        Space::Generic if is_within(Space::Shared, address) => Some(address - SHARED_WINDOW),
        _ => None,
    }
}
