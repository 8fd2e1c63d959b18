//! The one place that slices: fields are taken off the front of a message, in network order, and a short message is an
//! error that names the field.

use super::Fault;
use crate::pg::{Lsn, Oid, PgTime, Xid};

/// A message that is read from the front.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn bytes(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], Fault> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or(Fault::Truncated(field))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Fault> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(Fault::Truncated(field))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, Fault> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, Fault> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(super) fn i32(&mut self, field: &'static str) -> Result<i32, Fault> {
        self.array(field).map(i32::from_be_bytes)
    }

    /// A length or a count (`i32`), which is never negative.
    pub(super) fn length(&mut self, field: &'static str) -> Result<usize, Fault> {
        usize::try_from(self.i32(field)?).map_err(|_| Fault::Impossible("a negative length"))
    }

    pub(super) fn oid(&mut self, field: &'static str) -> Result<Oid, Fault> {
        self.array(field).map(u32::from_be_bytes).map(Oid)
    }

    /// The id of a transaction; 0 is none.
    pub(super) fn xid(&mut self, field: &'static str) -> Result<Xid, Fault> {
        Xid::new(self.array(field).map(u32::from_be_bytes)?).ok_or(Fault::Impossible("transaction 0"))
    }

    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Lsn, Fault> {
        self.array(field).map(u64::from_be_bytes).map(Lsn::new)
    }

    pub(super) fn time(&mut self, field: &'static str) -> Result<PgTime, Fault> {
        self.array(field).map(i64::from_be_bytes).map(PgTime::from_micros)
    }

    /// Bytes up to the NUL that ends them.
    pub(super) fn text(&mut self, field: &'static str) -> Result<&'a [u8], Fault> {
        let length = self.rest.iter().position(|byte| *byte == 0).ok_or(Fault::Truncated(field))?;
        let text = self.bytes(length, field)?;
        self.bytes(1, field)?;
        Ok(text)
    }

    /// A byte of flags of which none has a meaning yet.
    pub(super) fn no_flags(&mut self, field: &'static str) -> Result<(), Fault> {
        match self.u8(field)? {
            0 => Ok(()),
            _ => Err(Fault::Impossible(field)),
        }
    }

    /// What has been read is the whole.
    pub(super) const fn end(&self) -> Result<(), Fault> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(Fault::LeftOver(more)),
        }
    }
}
