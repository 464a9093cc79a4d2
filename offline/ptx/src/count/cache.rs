//! The first-level cache of a multiprocessor, as far as counts hang on it: lines of 128 bytes in four sectors, four lines a set, the
//! one that was longest unused gives way. Stores write through and keep nothing; atomics pass by.

/// Bytes of a line.
pub const LINE: u64 = 128;
const WAYS: usize = 4;

/// One line's place.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    /// The line plus one; 0 is none.
    line: u64,
    sectors: u8,
    used: u64,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    sets: Vec<[Way; WAYS]>,
    clock: u64,
}

impl Cache {
    /// An empty one of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { sets: vec![Default::default(); (bytes / LINE as usize / WAYS).max(1)], clock: 0 }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.sets.fill(Default::default());
    }

    /// Reads the sectors of a line, bit `i` being sector `i`; those that were not there.
    pub fn read(&mut self, line: u64, sectors: u8) -> u8 {
        self.clock += 1;
        let count = self.sets.len() as u64;
        // Neighbouring pages don't fall on the same sets.
        let set = &mut self.sets[((line ^ line >> 13) % count) as usize];
        let way = match set.iter().position(|way| way.line == line + 1) {
            Some(at) => &mut set[at],
            None => {
                let oldest = set.iter_mut().min_by_key(|way| way.used).expect("a set has ways");
                *oldest = Way { line: line + 1, sectors: 0, used: 0 };
                oldest
            }
        };
        let missing = sectors & !way.sectors;
        way.sectors |= sectors;
        way.used = self.clock;
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_fetched_once_until_its_line_gives_way() {
        let mut cache = Cache::new(WAYS * LINE as usize);
        assert_eq!(cache.read(7, 0b0011), 0b0011);
        assert_eq!(cache.read(7, 0b0110), 0b0100);
        for line in 8..11 {
            assert_eq!(cache.read(line, 1), 1);
        }
        assert_eq!(cache.read(7, 1), 0, "four lines fit");
        assert_eq!(cache.read(11, 1), 1);
        assert_eq!(cache.read(7, 1), 0, "the line used last stays");
        assert_eq!(cache.read(8, 1), 1, "the line unused longest is gone");
        cache.clear();
        assert_eq!(cache.read(7, 1), 1);
    }
}
