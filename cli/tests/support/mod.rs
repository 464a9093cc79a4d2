//! Runs the built command, and reads, breaks and compares safetensors files.

// Each test is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::{TempDir, tempdir};

/// What a run of the command left.
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `ultramem` with `args`, split at blanks.
pub fn ultramem(args: &str) -> Ran {
    ultramem_with(args, &[])
}

/// Runs `ultramem` on a machine that seems to have no adapter.
pub fn without_adapter(args: &str) -> Ran {
    let nothing = "/nonexistent";
    ultramem_with(args, &[("VK_DRIVER_FILES", nothing), ("VK_ICD_FILENAMES", nothing), ("CUDA_VISIBLE_DEVICES", "")])
}

pub fn ultramem_with(args: &str, environment: &[(&str, &str)]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_ultramem"))
        .args(args.split_whitespace())
        .envs(environment.iter().copied())
        .output()
        .expect("the command starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the command writes UTF-8");
    Ran { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Ran {
    /// Stdout of a run that ended well and said nothing on stderr.
    pub fn well(self) -> String {
        assert_eq!((self.status, self.stderr.as_str()), (Some(0), ""), "{}", self.stdout);
        self.stdout
    }

    /// The report of a run that ended well.
    pub fn json(self) -> Value {
        serde_json::from_str(&self.well()).expect("--json prints JSON")
    }

    /// The one line on stderr of a run that could not be done, all of `words` in it.
    pub fn refused(self, words: &[&str]) {
        assert_eq!((self.status, self.stdout.as_str()), (Some(2), ""), "{}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {:?}", self.stderr);
        }
    }
}

/// The golden files that this version can run.
pub const LAYERS: [&str; 5] = [
    "memory_plus_tiny",
    "ultramem_v1_layernorm_single_core",
    "ultramem_v1_mid",
    "ultramem_v1_tiny",
    "ultramem_v1_two_heads",
];

/// The path of a golden file.
pub fn fixture(name: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "tests", "fixtures", name].iter().collect();
    path.with_extension("safetensors").display().to_string()
}

/// A safetensors file, taken apart.
pub struct Parts {
    pub header: Value,
    pub data: Vec<u8>,
}

impl Parts {
    pub fn read(path: impl AsRef<Path>) -> Self {
        let bytes = std::fs::read(path).expect("the file is there");
        let (length, rest) = bytes.split_first_chunk().expect("a file holds a length");
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Self { header: serde_json::from_slice(header).expect("the header is JSON"), data: data.to_vec() }
    }

    pub fn write(&self, path: &Path) -> String {
        let header = self.header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(path, [&length, header.as_bytes(), &self.data].concat()).expect("the directory is there");
        path.display().to_string()
    }

    pub fn shape(&self, name: &str) -> Vec<u64> {
        serde_json::from_value(self.header[name]["shape"].clone()).expect("the tensor has a shape")
    }

    pub fn bytes(&mut self, name: &str) -> &mut [u8] {
        let offsets = &self.header[name]["data_offsets"];
        let at = |end: usize| offsets[end].as_u64().expect("the tensor has offsets") as usize;
        let (start, end) = (at(0), at(1));
        &mut self.data[start..end]
    }

    pub fn f32s(&mut self, name: &str) -> Vec<f32> {
        assert_eq!(self.header[name]["dtype"], "F32");
        self.bytes(name).chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
    }

    pub fn remove(&mut self, prefix: &str) {
        self.header.as_object_mut().expect("the header is an object").retain(|name, _| !name.starts_with(prefix));
        self.pack();
    }

    /// Moves the tensors together, as the format has them.
    pub fn pack(&mut self) {
        let header = self.header.as_object().expect("the header is an object");
        let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
        let mut data = Vec::new();
        for name in names {
            let bytes = self.bytes(&name).to_vec();
            self.header[&name]["data_offsets"] = vec![data.len(), data.len() + bytes.len()].into();
            data.extend(bytes);
        }
        self.data = data;
    }
}

pub fn relative_l2(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let difference: f32 = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
    (difference / expected.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

/// A folder that goes when it is dropped.
pub fn directory() -> TempDir {
    tempdir().expect("there is room for temporary files")
}

/// A copy of a golden file after `change`.
pub fn changed(directory: &TempDir, name: &str, change: impl FnOnce(&mut Parts)) -> String {
    let mut parts = Parts::read(fixture(name));
    change(&mut parts);
    parts.write(&directory.path().join("changed.safetensors"))
}
