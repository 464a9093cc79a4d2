//! The zip archive that `torch.save` writes: where in the file each entry's bytes are.

use std::{collections::BTreeMap, ops::Range};

use rawzip::{CompressionMethod, ZipArchive, ZipFileHeaderRecord, ZipSliceArchive};

use super::files::shown;

/// An archive with one pickle in it.
pub(super) struct Archive {
    entries: BTreeMap<String, Entry>,
    /// What the names begin with: `model/`.
    prefix: String,
}

/// Where an entry's bytes are, or why they can't be used as they are.
type Entry = Result<Range<usize>, String>;

/// The entry that holds the pickle.
const PICKLE: &str = "data.pkl";

impl Archive {
    /// The archive that fills `bytes`.
    pub(super) fn open(bytes: &[u8]) -> Result<Self, String> {
        let entries = entries(bytes)?;
        let folder = |name: &&str| name.is_empty() || name.ends_with('/');
        let mut prefixes = entries.keys().filter_map(|name| name.strip_suffix(PICKLE)).filter(folder);
        let Some(prefix) = prefixes.next() else {
            return Err(format!("is a zip archive without {PICKLE}, so not a file of torch.save"));
        };
        if let Some(other) = prefixes.next() {
            return Err(format!("holds {PICKLE} twice, under {} and {}", shown(prefix), shown(other)));
        }
        let prefix = prefix.to_string();
        Ok(Self { entries, prefix })
    }

    /// Where the pickle is.
    pub(super) fn pickle(&self) -> Entry {
        self.entry(PICKLE)
    }

    /// Where the bytes of the storage `key` are.
    pub(super) fn storage(&self, key: &str) -> Entry {
        self.entry(&format!("data/{key}"))
    }

    /// Where the file says in which order the bytes of a number are, if it does.
    pub(super) fn byte_order(&self) -> Option<Entry> {
        self.entries.get(&format!("{}byteorder", self.prefix)).cloned()
    }

    fn entry(&self, name: &str) -> Entry {
        let missing = || Err(format!("the archive has no entry {}", shown(name)));
        self.entries.get(&format!("{}{name}", self.prefix)).cloned().unwrap_or_else(missing)
    }
}

/// All entries whose name is text; nothing that `torch.save` writes has another.
fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Entry>, String> {
    let broken = |error| format!("is a broken zip archive: {error}");
    let zip = ZipArchive::from_slice(bytes).map_err(broken)?;
    let mut entries = BTreeMap::new();
    for record in zip.entries() {
        let record = record.map_err(broken)?;
        let Ok(name) = std::str::from_utf8(record.file_path().as_bytes()) else { continue };
        if entries.insert(name.to_string(), place(&zip, &record, name)).is_some() {
            return Err(format!("holds two entries called {}", shown(name)));
        }
    }
    Ok(entries)
}

fn place(zip: &ZipSliceArchive<&[u8]>, record: &ZipFileHeaderRecord<'_>, name: &str) -> Entry {
    let name = shown(name);
    if record.flags().is_encrypted() {
        return Err(format!("entry {name} is encrypted"));
    }
    if record.compression_method() != CompressionMethod::STORE {
        return Err(format!("entry {name} is compressed, where torch.save stores bytes as they are"));
    }
    let (stored, whole) = (record.compressed_size_hint(), record.uncompressed_size_hint());
    if stored != whole {
        return Err(format!("entry {name} is said to be {stored} bytes in the archive and {whole} outside of it"));
    }
    let entry = zip.get_entry(record.wayfinder()).map_err(|error| format!("entry {name}: {error}"))?;
    // The entry lies inside of the archive's bytes, so both fit a usize.
    let (begin, end) = entry.compressed_data_range();
    Ok(begin as usize..end as usize)
}
