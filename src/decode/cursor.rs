//! The one place that slices: fields are taken off the front of a slice, and a short slice is an error that names the
//! field.

use super::list::{Item, List};
use super::{DecodeError, Fault};
use crate::pg::{Lsn, Oid, PgTime, RelFile};

/// A slice of a record that is read from the front.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    /// The record's start, for errors.
    record: Lsn,
}

impl<'a> Cursor<'a> {
    #[inline]
    pub(super) const fn new(bytes: &'a [u8], record: Lsn) -> Self {
        Self { rest: bytes, record }
    }

    #[inline]
    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    #[inline]
    pub(super) const fn fault(&self, fault: Fault) -> DecodeError {
        DecodeError::damaged(self.record, fault)
    }

    #[inline]
    pub(super) fn bytes(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.fault(Fault::Truncated(field)))?;
        self.rest = rest;
        Ok(head)
    }

    #[inline]
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or_else(|| self.fault(Fault::Truncated(field)))?;
        self.rest = rest;
        Ok(*head)
    }

    #[inline]
    pub(super) fn skip(&mut self, length: usize, field: &'static str) -> Result<(), DecodeError> {
        self.bytes(length, field).map(|_| ())
    }

    #[inline]
    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    #[inline]
    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_le_bytes)
    }

    #[inline]
    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_le_bytes)
    }

    #[inline]
    pub(super) fn i32(&mut self, field: &'static str) -> Result<i32, DecodeError> {
        self.array(field).map(i32::from_le_bytes)
    }

    #[inline]
    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.array(field).map(u64::from_le_bytes)
    }

    #[inline]
    pub(super) fn i64(&mut self, field: &'static str) -> Result<i64, DecodeError> {
        self.array(field).map(i64::from_le_bytes)
    }

    #[inline]
    pub(super) fn bool(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        self.u8(field).map(|byte| byte != 0)
    }

    #[inline]
    pub(super) fn oid(&mut self, field: &'static str) -> Result<Oid, DecodeError> {
        self.u32(field).map(Oid)
    }

    #[inline]
    pub(super) fn time(&mut self, field: &'static str) -> Result<PgTime, DecodeError> {
        self.i64(field).map(PgTime::from_micros)
    }

    #[inline]
    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Lsn, DecodeError> {
        self.u64(field).map(Lsn::new)
    }

    /// (Postgres: `RelFileLocator`.)
    #[inline]
    pub(super) fn relation(&mut self, field: &'static str) -> Result<RelFile, DecodeError> {
        Ok(RelFile { tablespace: self.oid(field)?, database: self.oid(field)?, number: self.u32(field)? })
    }

    /// `count` items of `item_bytes` bytes.
    #[inline]
    pub(super) fn list<T: Item>(
        &mut self,
        count: usize,
        item_bytes: usize,
        field: &'static str,
    ) -> Result<List<'a, T>, DecodeError> {
        let length = count.checked_mul(item_bytes).ok_or_else(|| self.fault(Fault::Truncated(field)))?;
        Ok(List::new(self.bytes(length, field)?, item_bytes))
    }

    /// A count that is never negative.
    #[inline]
    pub(super) fn count(&mut self, field: &'static str) -> Result<usize, DecodeError> {
        usize::try_from(self.i32(field)?).map_err(|_| self.fault(Fault::Impossible("a negative count")))
    }

    /// A count (`i32`, never negative) and that many items of `item_bytes` bytes.
    #[inline]
    pub(super) fn counted_list<T: Item>(
        &mut self,
        item_bytes: usize,
        field: &'static str,
    ) -> Result<List<'a, T>, DecodeError> {
        let count = self.count(field)?;
        self.list(count, item_bytes, field)
    }

    /// Bytes up to the NUL that ends them.
    #[inline]
    pub(super) fn text(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let length = self.rest.iter().position(|b| *b == 0).ok_or_else(|| self.fault(Fault::Truncated(field)))?;
        let text = self.bytes(length, field)?;
        self.skip(1, field)?;
        Ok(text)
    }
}
