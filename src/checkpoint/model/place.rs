//! Where a model's settings say that its memory layers are.

use std::collections::BTreeSet;

use super::super::Settings;

/// The places of memory layers, as the settings have them.
pub(super) enum Places {
    /// The settings do not say.
    Unknown,
    /// One in each of so many blocks.
    Full(usize),
    /// Layers by their order, each with the block whose input it reads and the one after which its output is added.
    Between { text: String, blocks: Vec<(usize, usize)> },
    /// Layers by their blocks.
    Of { text: String, blocks: BTreeSet<usize> },
}

impl Places {
    pub(super) fn of(settings: &Settings) -> Result<Self, String> {
        match settings {
            Settings::Olmo(settings) => match settings.mem_insert_way.as_deref() {
                None => Ok(Self::Unknown),
                Some("full") => Ok(Self::Full(settings.n_layers)),
                Some(text) => Self::between(text),
            },
            Settings::Lingua(settings) => {
                let memory = settings.productkey_args.as_ref();
                if memory.is_some_and(|memory| memory.is_enabled == Some(false)) {
                    return Err("is_enabled is false, but the tensors have memory layers".into());
                }
                match memory.and_then(|memory| memory.layers.as_deref()) {
                    None => Ok(Self::Unknown),
                    Some(text) => Self::blocks(text),
                }
            }
        }
    }

    fn between(text: &str) -> Result<Self, String> {
        let place = |part: &str| {
            let (from, to) = part.split_once(':')?;
            Some((from.trim().parse().ok()?, to.trim().parse().ok()?))
        };
        let blocks = text.split('/').map(place).collect::<Option<_>>();
        let blocks =
            blocks.ok_or_else(|| format!("mem_insert_way is {text:?}, expected full, or blocks like 1:2/2:3"))?;
        Ok(Self::Between { text: text.into(), blocks })
    }

    fn blocks(text: &str) -> Result<Self, String> {
        let blocks = text.split(',').map(|block| block.trim().parse().ok()).collect::<Option<_>>();
        let blocks = blocks.ok_or_else(|| format!("layers is {text:?}, expected blocks like 1,3"))?;
        Ok(Self::Of { text: text.into(), blocks })
    }

    /// How many layers there are, if that is known.
    pub(super) fn count(&self) -> Option<usize> {
        match self {
            Self::Unknown => None,
            Self::Full(count) => Some(*count),
            Self::Between { blocks, .. } => Some(blocks.len()),
            Self::Of { blocks, .. } => Some(blocks.len()),
        }
    }

    /// Checks that `found` are the layers that there must be.
    pub(super) fn check(&self, found: BTreeSet<usize>) -> Result<(), String> {
        let in_order = |count| found.len() == count && found.iter().copied().eq(0..count);
        let (right, said) = match self {
            Self::Unknown => return Ok(()),
            Self::Full(count) => (in_order(*count), format!("mem_insert_way is \"full\", {count} layers")),
            Self::Between { text, blocks } => {
                let count = blocks.len();
                (in_order(count), format!("mem_insert_way is {text:?}, {count} layers"))
            }
            Self::Of { text, blocks } => (found == *blocks, format!("layers is {text:?}")),
        };
        if right {
            return Ok(());
        }
        const MOST: usize = 8;
        let listed: Vec<String> = found.iter().take(MOST).map(usize::to_string).collect();
        let more = if found.len() > MOST { ", …" } else { "" };
        Err(format!("{said}, but the tensors are of {}: {}{more}", found.len(), listed.join(", ")))
    }

    /// The blocks between which layer `number` is.
    pub(super) fn get(&self, number: usize) -> Option<(usize, usize)> {
        match self {
            Self::Unknown => None,
            Self::Full(_) | Self::Of { .. } => Some((number, number)),
            Self::Between { blocks, .. } => blocks.get(number).copied(),
        }
    }
}
