//! Lists in a record: items of one size, one after the other, read when they are looked at.

use std::fmt;
use std::marker::PhantomData;

use super::cursor::Cursor;
use crate::pg::{Lsn, Oid, RelFile, Xid};

/// Items that lie one after the other in a record, lent from it. Items are copied out one by one; nothing is allocated.
pub struct List<'a, T> {
    bytes: &'a [u8],
    item_bytes: usize,
    item: PhantomData<fn() -> T>,
}

/// What a [`List`] can hold.
pub trait Item: Sized {
    /// The item that lies in these bytes. `None` only if they are too few, which a list never hands out, or if the
    /// item stands for nothing.
    fn of(bytes: &[u8]) -> Option<Self>;
}

impl<'a, T: Item> List<'a, T> {
    /// The items of `item_bytes` bytes each in `bytes`; what is left over at the end is no item.
    pub(super) const fn new(bytes: &'a [u8], item_bytes: usize) -> Self {
        Self { bytes, item_bytes, item: PhantomData }
    }

    /// No items.
    pub const fn empty() -> Self {
        Self::new(&[], 1)
    }

    /// How many items there are.
    pub const fn len(&self) -> usize {
        match self.item_bytes {
            0 => 0,
            bytes => self.bytes.len() / bytes,
        }
    }

    /// True if there is none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The items in order.
    pub fn iter(&self) -> impl Iterator<Item = T> + use<'a, T> {
        self.bytes.chunks_exact(self.item_bytes.max(1)).filter_map(T::of)
    }
}

impl<T> Clone for List<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for List<'_, T> {}

impl<T: Item> Default for List<'_, T> {
    fn default() -> Self {
        Self::empty()
    }
}

impl<T: Item + fmt::Debug> fmt::Debug for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T: Item + PartialEq> PartialEq for List<'_, T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T: Item + Eq> Eq for List<'_, T> {}

impl Item for u16 {
    fn of(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().map(|chunk| Self::from_le_bytes(*chunk))
    }
}

impl Item for Oid {
    fn of(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().map(|chunk| Self(u32::from_le_bytes(*chunk)))
    }
}

impl Item for Xid {
    fn of(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().and_then(|chunk| Self::new(u32::from_le_bytes(*chunk)))
    }
}

impl Item for RelFile {
    fn of(bytes: &[u8]) -> Option<Self> {
        Cursor::new(bytes, Lsn::new(0)).relation("file").ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_as_many_items_as_whole_ones_lie_in_it() {
        let list: List<'_, u16> = List::new(&[1, 0, 2, 0, 9], 2);
        assert_eq!((list.len(), list.iter().collect::<Vec<_>>()), (2, vec![1, 2]));
        assert!(List::<u16>::empty().is_empty());
    }
}
