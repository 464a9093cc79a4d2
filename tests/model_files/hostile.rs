//! Files changed at random: each is read, or is an error of one line, in little time and memory.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use rawzip::ZipArchive;
use ultramem::checkpoint::{Settings, Tensors};

use super::{fixture, zipped};

/// `bytes` with one to four changes in `places`: a bit or a byte, something put in, cut out or repeated, or the end cut off.
fn changed(bytes: &[u8], places: std::ops::Range<usize>, rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..5) {
        let at = rng.random_range(places.clone()).min(bytes.len().saturating_sub(1));
        let end = rng.random_range(at..bytes.len().min(at + 40) + 1);
        match rng.random_range(0..8) {
            0..3 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            3 if at < bytes.len() => bytes[at] = [0, 0x7f, 0x80, 0xff, b'.', b'(', b'h', b'R'][rng.random_range(0..8)],
            4 => drop(bytes.splice(at..at, (0..rng.random_range(1..9)).map(|_| rng.random()).collect::<Vec<u8>>())),
            5 => drop(bytes.drain(at..end)),
            6 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
            _ if rng.random_range(0..4) == 0 => bytes.truncate(at),
            _ => {}
        }
    }
    bytes
}

/// Writes a new file at `path`. Some file systems wait for the disk when a file is written over.
fn put(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

/// Opens a model and reads every tensor. True if that could be done.
fn open(path: &Path, largest: usize) -> bool {
    let start = Instant::now();
    let opened = match Tensors::open(path) {
        Ok(tensors) => {
            for name in tensors.names() {
                assert!(tensors.get(name).unwrap().bytes.len() <= largest);
            }
            true
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains(char::is_control) && message.len() < 2_000, "{message:?}");
            false
        }
    };
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    opened
}

/// Opens `count` changed files; some can be opened, and most can't.
fn all_end(count: usize, largest: usize, mut change: impl FnMut(&mut StdRng) -> Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    let rng = &mut StdRng::seed_from_u64(7);
    let mut opened = 0;
    for _ in 0..count {
        put(&path, &change(rng));
        opened += usize::from(open(&path, largest));
    }
    assert!((1..count).contains(&opened), "{opened} of {count} could be opened");
    check_memory();
}

/// Checks how much memory the tests have had at once, where the system says it.
fn check_memory() {
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kilobytes < 500_000, "{line}");
}

/// The entries of an archive.
fn entries(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let archive = ZipArchive::from_slice(bytes).unwrap();
    let entry = |record: Result<rawzip::ZipFileHeaderRecord<'_>, _>| {
        let record = record.unwrap();
        let name = String::from_utf8(record.file_path().as_bytes().to_vec()).unwrap();
        (name, archive.get_entry(record.wayfinder()).unwrap().data().to_vec())
    };
    archive.entries().map(entry).collect()
}

const FILES: [&str; 4] = ["torch/views.pt", "torch/views_protocol5.pt", "torch/trainer.pt", "torch/nested.pth"];

#[test]
fn changed_pickles_in_an_archive_again() {
    for file in FILES {
        let entries = entries(&fs::read(fixture(file)).unwrap());
        let pickle = entries.iter().position(|(name, _)| name.ends_with("/data.pkl")).unwrap();
        all_end(2_500, 20_000, |rng| {
            let mut entries = entries.clone();
            let whole = 0..entries[pickle].1.len();
            entries[pickle].1 = changed(&entries[pickle].1, whole, rng);
            zipped(&entries)
        });
    }
}

#[test]
fn changed_pickles_in_place() {
    for file in FILES {
        let bytes = fs::read(fixture(file)).unwrap();
        let (_, pickle) = entries(&bytes).into_iter().find(|(name, _)| name.ends_with("/data.pkl")).unwrap();
        let begin = bytes.windows(pickle.len()).position(|part| part == pickle).unwrap();
        all_end(2_500, 20_000, |rng| {
            let mut bytes = bytes.clone();
            for _ in 0..rng.random_range(1..5) {
                bytes[begin + rng.random_range(0..pickle.len())] ^= 1 << rng.random_range(0..8);
            }
            bytes
        });
    }
}

#[test]
fn changed_directories_of_archives() {
    for file in ["torch/views.pt", "torch/zip64.pt"] {
        let bytes = fs::read(fixture(file)).unwrap();
        let directory = bytes.windows(4).position(|part| part == b"PK\x01\x02").unwrap();
        let end = bytes.windows(4).rposition(|part| part == b"PK\x05\x06" || part == b"PK\x06\x06").unwrap();
        for places in [directory..bytes.len(), end..bytes.len(), 0..bytes.len()] {
            all_end(2_000, 20_000, |rng| changed(&bytes, places.clone(), rng));
        }
    }
}

#[test]
fn changed_indices() {
    let folder = tempfile::tempdir().unwrap();
    let golden = fixture("olmo_ultramem_v2_sharded");
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        fs::copy(golden.join(shard), folder.path().join(shard)).unwrap();
    }
    let index = fs::read(golden.join("model.safetensors.index.json")).unwrap();
    let path = folder.path().join("model.safetensors.index.json");
    let rng = &mut StdRng::seed_from_u64(8);
    for _ in 0..2_000 {
        put(&path, &changed(&index, 0..index.len(), rng));
        open(&path, 300_000);
    }
}

#[test]
fn changed_settings() {
    let folder = tempfile::tempdir().unwrap();
    let rng = &mut StdRng::seed_from_u64(9);
    for (file, name) in [("olmo_ultramem_v1/config.yaml", "a.yaml"), ("lingua_peer/params.json", "a.json")] {
        let text = fs::read(fixture(file)).unwrap();
        let path = folder.path().join(name);
        for _ in 0..2_000 {
            put(&path, &changed(&text, 0..text.len(), rng));
            if let Err(error) = Settings::read(&path) {
                let message = error.to_string();
                assert!(!message.contains(char::is_control) && message.len() < 2_000, "{message:?}");
            }
        }
    }
}
