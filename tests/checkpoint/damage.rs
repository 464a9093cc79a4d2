//! Files spoiled at random: each is refused in one line, or still is a layer that runs.

use proptest::{prelude::*, sample::Index};
use serde_json::json;
use ultramem::{Checkpoint, Error, reference::forward};

use crate::common::KINDS;
use crate::raw::{RawFile, small_file};

/// One way to spoil a file. Those that name a tensor or an entry take them as they come.
#[derive(Debug, Clone)]
enum Damage {
    Flip { at: Index, bits: u8 },
    FlipInHeader { at: Index, bits: u8 },
    Cut { at: Index },
    Append(Vec<u8>),
    HeaderLength(u64),
    Metadata { key: Index, text: String },
    MetadataGone { key: Index },
    Drop { tensor: Index },
    Leave { tensor: Index },
    Reverse { tensor: Index },
    Shape { tensor: Index, shape: Vec<u64> },
    Type { tensor: Index, dtype: &'static str },
    Offsets { tensor: Index, offsets: [u64; 2] },
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..20u64, Just(1 << 31), Just(1 << 32), Just(1 << 61), Just(1 << 63), Just(u64::MAX), any::<u64>()]
}

fn text() -> impl Strategy<Value = String> {
    let odd = [
        "",
        "0",
        "-3",
        "1",
        "2",
        "4",
        "9",
        "16",
        "1e9",
        "1048576",
        "65536",
        "99999999999999999999",
        "NaN",
        "inf",
        "-1",
        "1e-05",
        "0.0",
        "3e38",
        "pkm",
        "memory_plus",
        "ultramem_v1",
        "ultramem_v2",
        "rms",
        "default",
        "\n",
        "é",
    ];
    prop_oneof![prop::sample::select(odd.to_vec()).prop_map(String::from), number().prop_map(|x| x.to_string())]
}

fn damage() -> impl Strategy<Value = Damage> {
    let types = ["BOOL", "F4", "U8", "F16", "BF16", "F32", "F64", "I32", "U32", "I64", "U64", "F33"];
    let at = any::<Index>;
    prop_oneof![
        (at(), 1..=255u8).prop_map(|(at, bits)| Damage::Flip { at, bits }),
        (at(), 1..=255u8).prop_map(|(at, bits)| Damage::FlipInHeader { at, bits }),
        at().prop_map(|at| Damage::Cut { at }),
        prop::collection::vec(any::<u8>(), 1..9).prop_map(Damage::Append),
        number().prop_map(Damage::HeaderLength),
        (at(), text()).prop_map(|(key, text)| Damage::Metadata { key, text }),
        at().prop_map(|key| Damage::MetadataGone { key }),
        at().prop_map(|tensor| Damage::Drop { tensor }),
        at().prop_map(|tensor| Damage::Leave { tensor }),
        at().prop_map(|tensor| Damage::Reverse { tensor }),
        (at(), prop::collection::vec(number(), 0..6)).prop_map(|(tensor, shape)| Damage::Shape { tensor, shape }),
        (at(), prop::sample::select(types.to_vec())).prop_map(|(tensor, dtype)| Damage::Type { tensor, dtype }),
        (at(), [number(), number()]).prop_map(|(tensor, offsets)| Damage::Offsets { tensor, offsets }),
    ]
}

impl Damage {
    fn apply(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Flip { at, bits } if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                bytes[at] ^= bits;
            }
            Self::FlipInHeader { at, bits } if bytes.len() > 1000 => bytes[at.index(1000)] ^= bits,
            Self::Cut { at } if !bytes.is_empty() => bytes.truncate(at.index(bytes.len())),
            Self::Append(more) => bytes.extend(more),
            Self::HeaderLength(length) if bytes.len() > 8 => bytes[..8].copy_from_slice(&length.to_le_bytes()),
            _ => {
                if let Some(file) = RawFile::parse(&bytes).and_then(|file| self.apply_to_header(file)) {
                    return file.bytes();
                }
            }
        }
        bytes
    }

    /// None if an earlier damage has left nothing to spoil.
    fn apply_to_header(&self, mut file: RawFile) -> Option<RawFile> {
        let names = file.tensors();
        let name = |at: &Index| names.get(at.index(names.len().max(1)));
        let keys: Vec<String> = file.header.get("__metadata__")?.as_object()?.keys().cloned().collect();
        let key = |at: &Index| keys.get(at.index(keys.len().max(1)));
        match self {
            Self::Metadata { key: at, text } => file = file.with_metadata(key(at)?, text),
            Self::MetadataGone { key: at } => file = file.without_metadata(key(at)?),
            Self::Drop { tensor } => file = file.try_without_tensor(name(tensor)?)?,
            Self::Leave { tensor } => drop(file.header.as_object_mut()?.remove(name(tensor)?)),
            Self::Reverse { tensor } => file.header[name(tensor)?]["shape"].as_array_mut()?.reverse(),
            Self::Shape { tensor, shape } => file = file.with_field(name(tensor)?, "shape", json!(shape)),
            Self::Type { tensor, dtype } => file = file.with_field(name(tensor)?, "dtype", json!(dtype)),
            Self::Offsets { tensor, offsets } => {
                file = file.with_field(name(tensor)?, "data_offsets", json!(offsets));
            }
            _ => return None,
        }
        Some(file)
    }
}

/// Reads `bytes` and, if they hold a layer after all, runs it.
fn read_and_run(bytes: Vec<u8>) -> Result<(), Error> {
    let file = Checkpoint::from_bytes(bytes)?;
    let weights = file.weights()?;
    let config = file.config();
    let found = forward(config, &weights, &vec![0.5; config.hidden_size])?;
    assert_eq!(found.output.len(), config.hidden_size);
    assert!(found.slots.iter().all(|&slot| (slot as usize) < config.slots()));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(damages in prop::collection::vec(damage(), 1..4)) {
        for kind in KINDS {
            thread_local!(static FILES: Vec<Vec<u8>> = KINDS.iter().map(|&kind| small_file(kind).bytes()).collect());
            let good = FILES.with(|files| files[kind as usize].clone());
            let damaged = damages.iter().fold(good, |bytes, damage| damage.apply(bytes));
            if let Err(error) = read_and_run(damaged) {
                let message = error.to_string();
                prop_assert!(message.lines().count() == 1, "{message:?}");
            }
        }
    }
}
