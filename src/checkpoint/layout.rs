//! Where in a file a tensor is, and its numbers in row-major order.

use std::borrow::Cow;

use super::header::Place;

/// Where in a file a tensor is.
pub(super) struct Layout {
    /// Its bytes are those from its first to its last number.
    pub(super) place: Place,
    /// How many numbers lie between two neighbours along each dimension, where the numbers are not row-major.
    pub(super) strides: Option<Vec<usize>>,
}

impl Layout {
    /// How many bytes the tensor's numbers are: no more than the file has, which was checked when it was opened.
    pub(super) fn length(&self) -> usize {
        match self.strides {
            Some(_) => self.place.shape.iter().product::<usize>() * self.place.dtype.bitsize() / 8,
            None => self.place.bytes.len(),
        }
    }

    /// The tensor's numbers, row-major, from the bytes of its file.
    pub(super) fn bytes<'a>(&self, file: &'a [u8]) -> Cow<'a, [u8]> {
        let bytes = &file[self.place.bytes.clone()];
        let Some(strides) = &self.strides else { return Cow::Borrowed(bytes) };
        let width = self.place.dtype.bitsize() / 8;
        let strides = strides.iter().map(|stride| stride * width);
        let dimensions: Vec<(usize, usize)> = self.place.shape.iter().copied().zip(strides).collect();
        let mut gathered = Vec::with_capacity(self.length());
        gather(bytes, width, &dimensions, &mut gathered);
        Cow::Owned(gathered)
    }
}

/// Appends the numbers of `width` bytes that lie in `bytes` along `dimensions`, each with its size and its stride in bytes.
fn gather(bytes: &[u8], width: usize, dimensions: &[(usize, usize)], gathered: &mut Vec<u8>) {
    match *dimensions {
        [] => gathered.extend_from_slice(&bytes[..width]),
        [(size, stride)] if stride == width => gathered.extend_from_slice(&bytes[..size * width]),
        [(size, stride), ref inner @ ..] => {
            for index in 0..size {
                gather(&bytes[index * stride..], width, inner, gathered);
            }
        }
    }
}
