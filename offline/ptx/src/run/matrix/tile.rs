//! Matrices between memory and registers.
//!
//! A tile of `wmma` is read and written in pieces of 16 bytes, or of a whole line where that is shorter, one lane after the other along
//! the lines: each byte of the tile once, and none besides. The manual asks for more alignment than that of such a piece.

use crate::error::Stop;
use crate::lanes::{ALL, Long, Mask, WARP, Word, lanes, those};
use crate::operand::{Address, Source, Space, Vector};
use crate::program::fragment::{MOST, Steps};
use crate::program::matrix::{Tile, Transposed};
use crate::run::context::Context;
use crate::run::memory::{Kind, read, write};
use crate::run::observe::{At, Observer};
use crate::run::warp::Warp;

/// Bytes of the largest tile.
const BYTES: usize = 2 * MOST;
/// Bytes that a lane accesses at once.
const PIECE: usize = 16;

/// A tile's lines in memory.
struct Lines {
    count: usize,
    /// Bytes of a line.
    bytes: usize,
    /// Bytes from line to line.
    stride: u64,
    /// Where the fragment's elements lie when lines are put together.
    steps: Steps,
}

impl Tile {
    fn lines<O>(&self, warp: &Warp, context: &Context<'_, '_, O>) -> Lines {
        let (rows, columns) = (self.fragment.rows, self.fragment.columns);
        let (count, length, steps) = if self.by_rows != self.fragment.transposed {
            (rows, columns, Steps { down: columns, across: 1 })
        } else {
            (columns, rows, Steps { down: 1, across: rows })
        };
        let size = self.fragment.number.size();
        let stride = self.stride.map_or(length as u64, |stride| u64::from(warp.word(&stride, context)[0]));
        Lines { count, bytes: length * size, stride: stride.wrapping_mul(size as u64), steps }
    }

    /// Hands `visit` the bytes of each piece in memory and where they lie when lines are put together.
    fn pieces<O: Observer>(
        &self,
        warp: &mut Warp,
        at: &At,
        (lines, kind): (&Lines, Kind),
        context: &mut Context<'_, '_, O>,
        mut visit: impl FnMut(&mut [u8], usize),
    ) -> Result<(), Stop> {
        // All lanes have the same address, or it is not defined what happens.
        let start = warp.addresses(&self.address, context)[0];
        let size = PIECE.min(lines.bytes);
        let in_line = lines.bytes / size;
        let total = in_line * lines.count;
        for first in (0..total).step_by(WARP) {
            let mask = those(|lane| first + lane < total);
            let addresses: Long = std::array::from_fn(|lane| {
                let piece = first + lane;
                let line = lines.stride.wrapping_mul((piece / in_line) as u64);
                start.wrapping_add(line).wrapping_add((piece % in_line * size) as u64)
            });
            warp.reach(at, mask, (self.space, size, kind), &addresses, context, |_, bytes, offsets, mask| {
                for lane in lanes(mask) {
                    visit(&mut bytes[offsets[lane] as usize..][..size], (first + lane) * size);
                }
            })?;
        }
        Ok(())
    }
}

/// `wmma.load`
pub fn load<O: Observer>(
    warp: &mut Warp,
    at: &At,
    tile: &Tile,
    targets: &Vector,
    context: &mut Context<'_, '_, O>,
) -> Result<(), Stop> {
    let lines = tile.lines(warp, context);
    let mut whole = [0u8; BYTES];
    tile.pieces(warp, at, (&lines, Kind::Load), context, |bytes, place| {
        whole[place..][..bytes.len()].copy_from_slice(bytes);
    })?;
    let size = tile.fragment.number.size();
    let words = tile.fragment.put(lines.steps, |places| places.map(|place| read(&whole, place * size, size) as u32));
    warp.set_registers(targets, &words);
    Ok(())
}

/// `wmma.store`
pub fn store<O: Observer>(
    warp: &mut Warp,
    at: &At,
    tile: &Tile,
    sources: &[Source],
    context: &mut Context<'_, '_, O>,
) -> Result<(), Stop> {
    let lines = tile.lines(warp, context);
    let mut whole = [0u8; BYTES];
    let size = tile.fragment.number.size();
    tile.fragment.take(&warp.registers(sources, context), lines.steps, |places, bits| {
        for lane in 0..WARP {
            write(&mut whole, places[lane] * size, size, bits[lane].into());
        }
    });
    tile.pieces(warp, at, (&lines, Kind::Store), context, |bytes, place| {
        bytes.copy_from_slice(&whole[place..][..bytes.len()]);
    })
}

/// The lanes that say where the rows of so many matrices lie.
fn naming(matrices: usize) -> Mask {
    ALL >> (WARP - 8 * matrices)
}

/// `ldmatrix`: lane `8 i + r` names row `r` of matrix `i`, and lane `l` gets the two numbers at row `l / 4` and columns `l % 4 * 2` and
/// the next.
pub fn load_rows<O: Observer>(
    warp: &mut Warp,
    at: &At,
    (space, transpose): (Space, Transposed),
    targets: &Vector,
    address: &Address,
    context: &mut Context<'_, '_, O>,
) -> Result<(), Stop> {
    let addresses = warp.addresses(address, context);
    let mut words = vec![[0; WARP]; targets.len()];
    let access = (space, PIECE, Kind::Load);
    warp.reach(at, naming(targets.len()), access, &addresses, context, |_, bytes, offsets, mask| {
        for lane in lanes(mask) {
            for pair in 0..4 {
                words[lane / 8][lane % 8 * 4 + pair] = read(bytes, offsets[lane] as usize + 4 * pair, 4) as u32;
            }
        }
    })?;
    if transpose {
        words.iter_mut().for_each(|word| *word = transposed(word));
    }
    warp.set_registers(targets, &words);
    Ok(())
}

/// `stmatrix`, the opposite of [`load_rows`].
pub fn store_rows<O: Observer>(
    warp: &mut Warp,
    at: &At,
    (space, transpose): (Space, Transposed),
    sources: &[Source],
    address: &Address,
    context: &mut Context<'_, '_, O>,
) -> Result<(), Stop> {
    let addresses = warp.addresses(address, context);
    let mut words = warp.registers(sources, context);
    if transpose {
        words.iter_mut().for_each(|word| *word = transposed(word));
    }
    let access = (space, PIECE, Kind::Store);
    warp.reach(at, naming(sources.len()), access, &addresses, context, |_, bytes, offsets, mask| {
        for lane in lanes(mask) {
            for pair in 0..4 {
                let word = words[lane / 8][lane % 8 * 4 + pair];
                write(bytes, offsets[lane] as usize + 4 * pair, 4, word.into());
            }
        }
    })
}

/// The transpose of a matrix of 8 rows and columns of 16 bits, of which a lane holds two neighbours of a row.
pub fn transposed(word: &Word) -> Word {
    let element = |row: usize, column: usize| word[row * 4 + column / 2] >> (column % 2 * 16) & 0xffff;
    std::array::from_fn(|lane| {
        let (row, column) = (lane / 4, lane % 4 * 2);
        element(column, row) | element(column + 1, row) << 16
    })
}
