//! Whole models as training leaves them: their tensors and settings are read, and a broken file is an error of one line.

#![cfg(feature = "files")]

mod hostile;
mod replaced;
mod settings;
mod shards;
mod torch;

use std::{fs, io::Write, path::PathBuf};

use rawzip::ZipArchiveWriter;
use ultramem::checkpoint::Tensors;

/// A file or folder among the models of the fixtures.
fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// How many tensors a model has, and FNV-1a over the name, type, shape and bytes of each, in the order of the names. The numbers to compare
/// with come from Python: `torch.load`, and the safetensors format by hand.
fn sum(tensors: &Tensors) -> (usize, u64) {
    let mut hash = 0xcbf29ce484222325u64;
    let mut add =
        |bytes: &[u8]| bytes.iter().for_each(|&byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3));
    let names: Vec<&str> = tensors.names().collect();
    for name in &names {
        let tensor = tensors.get(name).unwrap();
        add(format!("{name} {} {:?}", tensor.dtype, tensor.shape).as_bytes());
        add(&tensor.bytes);
    }
    (names.len(), hash)
}

/// The error of a model that can't be opened, without the path in front of it.
fn refused(path: impl Into<PathBuf>) -> String {
    let path = path.into();
    let message = Tensors::open(&path).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message:?}");
    message
        .rsplit_once(path.file_name().unwrap().to_str().unwrap())
        .map_or(message.clone(), |(_, rest)| rest.trim_start_matches(": ").to_string())
}

/// A zip archive of entries stored as they are.
fn zipped(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = ZipArchiveWriter::new(&mut bytes);
    for (name, content) in entries {
        let (mut entry, config) = archive.new_file(name.as_str()).start().unwrap();
        let mut writer = config.wrap(&mut entry);
        writer.write_all(content).unwrap();
        let (_, descriptor) = writer.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    archive.finish().unwrap();
    bytes
}

/// A file with `content`, in a folder that lasts as long as the first value.
fn file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    (folder, path)
}
