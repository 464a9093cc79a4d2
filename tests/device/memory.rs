//! What a call allocates, against the documented formula.

use std::thread;

use cubecl::prelude::*;
use cubecl::wgpu::{AutoGraphicsApi, MemoryConfiguration, RuntimeOptions, WgpuDevice, WgpuRuntime, init_device, init_setup};
use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, MemoryLayer, Weights};

use crate::common::{random_input, small};
use crate::device::{Client, Layer, client, every_strategy};
