//! One WAL record: its header, its block references and its main data, all lent from the reader's buffer.

use super::cursor::Cursor;
use super::{DecodeError, Fault, WalMajor};
use crate::pg::{BLOCK_SIZE, Fork, Lsn, Oid, RelFile, TimelineId, Xid};

/// Which resource manager wrote a record, and will replay it. Numbers from 128 up are extensions'.
///
/// (Postgres: `access/rmgrlist.h`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RmgrId(pub u8);

impl RmgrId {
    /// Checkpoints, restore points, switches, page images.
    pub const XLOG: Self = Self(0);
    /// Commits and aborts.
    pub const XACT: Self = Self(1);
    /// Files made and cut short.
    pub const STORAGE: Self = Self(2);
    /// Pages of commit states (`pg_xact`).
    pub const CLOG: Self = Self(3);
    /// Databases made and dropped.
    pub const DATABASE: Self = Self(4);
    /// Tablespaces made and dropped.
    pub const TABLESPACE: Self = Self(5);
    /// Rows locked by several transactions.
    pub const MULTIXACT: Self = Self(6);
    /// Files of the catalogs that `pg_class` cannot hold.
    pub const RELMAP: Self = Self(7);
    /// What a standby that answers queries must know.
    pub const STANDBY: Self = Self(8);
    /// Tables: pruning, freezing, several rows at once.
    pub const HEAP2: Self = Self(9);
    /// Tables: rows.
    pub const HEAP: Self = Self(10);
    /// B-tree indexes.
    pub const BTREE: Self = Self(11);
    /// Hash indexes.
    pub const HASH: Self = Self(12);
    /// GIN indexes.
    pub const GIN: Self = Self(13);
    /// GiST indexes.
    pub const GIST: Self = Self(14);
    /// Sequences.
    pub const SEQUENCE: Self = Self(15);
    /// SP-GiST indexes.
    pub const SPGIST: Self = Self(16);
    /// BRIN indexes.
    pub const BRIN: Self = Self(17);
    /// Times of commits (`pg_commit_ts`).
    pub const COMMIT_TS: Self = Self(18);
    /// Progress of logical replication.
    pub const REPLICATION_ORIGIN: Self = Self(19);
    /// Extensions that log differences of pages.
    pub const GENERIC: Self = Self(20);
    /// Messages for logical decoding.
    pub const LOGICAL_MESSAGE: Self = Self(21);

    /// The name that `pg_waldump` prints; empty for an extension's.
    pub const fn name(self) -> &'static str {
        match self.0 {
            0 => "XLOG",
            1 => "Transaction",
            2 => "Storage",
            3 => "CLOG",
            4 => "Database",
            5 => "Tablespace",
            6 => "MultiXact",
            7 => "RelMap",
            8 => "Standby",
            9 => "Heap2",
            10 => "Heap",
            11 => "Btree",
            12 => "Hash",
            13 => "Gin",
            14 => "Gist",
            15 => "Sequence",
            16 => "SPGist",
            17 => "BRIN",
            18 => "CommitTs",
            19 => "ReplicationOrigin",
            20 => "Generic",
            21 => "LogicalMessage",
            _ => "",
        }
    }
}

/// What every record begins with.
///
/// (Postgres: `XLogRecord` in `access/xlogrecord.h`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of the record, this header included.
    pub total_length: u32,
    /// The transaction or subtransaction that wrote it, if one did.
    pub xid: Option<Xid>,
    /// Where the record before it begins.
    pub previous: Lsn,
    /// The high four bits belong to the resource manager, the low four to the WAL machinery.
    pub info: u8,
    /// Whose record it is.
    pub rmgr: RmgrId,
    /// CRC-32C of the body and then of the first 20 bytes of the header.
    pub crc: u32,
}

impl RecordHeader {
    /// Bytes of the header.
    pub const BYTES: usize = 24;

    /// Bytes of the header that the checksum covers.
    pub(super) const CHECKED_BYTES: usize = 20;

    pub(super) fn read(bytes: &[u8; Self::BYTES]) -> Self {
        let [l0, l1, l2, l3, x0, x1, x2, x3, p0, p1, p2, p3, p4, p5, p6, p7, info, rmgr, _, _, c0, c1, c2, c3] = *bytes;
        Self {
            total_length: u32::from_le_bytes([l0, l1, l2, l3]),
            xid: Xid::new(u32::from_le_bytes([x0, x1, x2, x3])),
            previous: Lsn::new(u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7])),
            info,
            rmgr: RmgrId(rmgr),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }
}

/// A record whose checksum and place in the chain are proved. Its parts are read on demand, without allocation.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next may begin at the earliest: its end rounded up to 8 bytes, as Postgres counts
    /// (`pg_last_wal_replay_lsn()` after its replay); for a switch, the end of the segment.
    pub end: Lsn,
    /// Its header.
    pub header: RecordHeader,
    pub(super) body: &'a [u8],
    pub(super) around: &'a Around,
}

/// What a record has in common with those around it. It is lent: a record is copied often, and quickly if it consists of whole
/// words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around {
    pub(super) timeline: Option<TimelineId>,
    pub(super) major: WalMajor,
}

impl<'a> Record<'a> {
    /// The timeline of the page on which it ends.
    pub const fn timeline(&self) -> TimelineId {
        match self.around.timeline {
            Some(timeline) => timeline,
            None => TimelineId::FIRST,
        }
    }

    /// The resource manager's opcode and flags: `info` without the low four bits.
    pub const fn operation(&self) -> u8 {
        self.header.info & 0xF0
    }

    /// The format that the record is written in.
    pub const fn major(&self) -> WalMajor {
        self.around.major
    }

    /// False if the record is so long that the reader kept only its beginning: its checksum is proved, but its parts
    /// cannot be read.
    pub const fn is_whole(&self) -> bool {
        self.body.len() + RecordHeader::BYTES == self.header.total_length as usize
    }

    /// Everything behind the header, as far as the reader kept it ([`Record::is_whole`]).
    pub const fn body(&self) -> &'a [u8] {
        self.body
    }

    /// The block references, and behind them the main data.
    ///
    /// # Errors
    /// If the list of parts is not one that Postgres writes.
    pub fn parts(&self) -> Result<Parts<'a>, DecodeError> {
        Parts::read(self)
    }

    /// What the resource manager wrote about the record as a whole; empty if nothing.
    ///
    /// # Errors
    /// As [`Record::parts`].
    pub fn main_data(&self) -> Result<&'a [u8], DecodeError> {
        // Most records of the managers whose main data matters have no other part.
        match self.body {
            [MAIN_SHORT, length, data @ ..] if data.len() == usize::from(*length) => Ok(data),
            _ => self.parts().map(|parts| parts.main_data),
        }
    }

    /// File, page and main data of a record that has one block reference, to the main fork, and short main data: the shape of
    /// most records. `None` for any other, damaged ones included.
    #[inline]
    pub(super) fn only_page(&self) -> Option<(RelFile, u32, &'a [u8])> {
        let ([id, flags, d0, d1], rest) = self.body.split_first_chunk()?;
        let data_length = u16::from_le_bytes([*d0, *d1]);
        let has_data = flags & HAS_DATA != 0;
        if *id != 0 || flags & (FORK | SAME_RELATION) != 0 || has_data != (data_length > 0) || !self.is_whole() {
            return None;
        }
        match flags & HAS_IMAGE == 0 {
            true => Self::only_page_at(rest, usize::from(data_length)),
            false => self.only_page_behind_image(rest, usize::from(data_length)),
        }
    }

    #[cold]
    fn only_page_behind_image(&self, rest: &'a [u8], data_length: usize) -> Option<(RelFile, u32, &'a [u8])> {
        let mut cursor = self.cursor(rest);
        let image = ImageHeader::read(&mut cursor, self.major()).ok()?;
        Self::only_page_at(cursor.rest(), data_length + usize::from(image.length))
    }

    /// The rest of the block reference, `payload` bytes that belong to it, and the main data.
    #[inline]
    fn only_page_at(rest: &'a [u8], payload: usize) -> Option<(RelFile, u32, &'a [u8])> {
        let ([place @ .., part, main_length], rest) = rest.split_first_chunk::<18>()?;
        if *part != MAIN_SHORT || rest.len() != payload + usize::from(*main_length) {
            return None;
        }
        let [t0, t1, t2, t3, b0, b1, b2, b3, f0, f1, f2, f3, n0, n1, n2, n3] = *place;
        let file = RelFile {
            tablespace: Oid(u32::from_le_bytes([t0, t1, t2, t3])),
            database: Oid(u32::from_le_bytes([b0, b1, b2, b3])),
            number: u32::from_le_bytes([f0, f1, f2, f3]),
        };
        Some((file, u32::from_le_bytes([n0, n1, n2, n3]), rest.get(payload..)?))
    }

    /// True if the record is nothing but short main data, as ends of transactions are.
    #[inline]
    pub(super) fn is_only_main(&self) -> bool {
        matches!(self.body, [MAIN_SHORT, length, data @ ..] if data.len() == usize::from(*length)) && self.is_whole()
    }

    /// The block reference with this number, `None` if the record has none.
    pub(super) fn block(&self, id: u8) -> Result<Option<Block<'a>>, DecodeError> {
        for block in self.parts()?.blocks() {
            let block = block?;
            if block.id == id {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    /// For reading a part of the record.
    pub(super) const fn cursor(&self, part: &'a [u8]) -> Cursor<'a> {
        Cursor::new(part, self.lsn)
    }

    pub(super) fn main_cursor(&self) -> Result<Cursor<'a>, DecodeError> {
        Ok(Cursor::new(self.main_data()?, self.lsn))
    }
}

const BLOCK_ID_MAX: u8 = 32;
const TOP_XID: u8 = 252;
const ORIGIN: u8 = 253;
const MAIN_LONG: u8 = 254;
const MAIN_SHORT: u8 = 255;

/// The parts of a record.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// What the resource manager wrote about the record as a whole.
    pub main_data: &'a [u8],
    /// The top-level transaction, where the record says it (`wal_level = logical`, once per subtransaction).
    pub top_xid: Option<Xid>,
    /// The replication origin, if the change came from elsewhere.
    pub origin: Option<u16>,
    blocks: Blocks<'a>,
}

impl<'a> Parts<'a> {
    /// The pages that the record touches, in order.
    pub const fn blocks(&self) -> Blocks<'a> {
        self.blocks
    }

    /// (Postgres: `DecodeXLogRecord` in `access/transam/xlogreader.c`.)
    fn read(record: &Record<'a>) -> Result<Self, DecodeError> {
        let mut headers = Cursor::new(record.body, record.lsn);
        if !record.is_whole() {
            return Err(headers.fault(Fault::TooLong));
        }
        let mut payload: usize = 0;
        let mut block_bytes: usize = 0;
        let mut main_length = 0;
        let mut block_last = None;
        let mut relation = None;
        let (mut top_xid, mut origin) = (None, None);
        while headers.rest().len() > payload {
            match headers.u8("part id")? {
                id @ 0..=BLOCK_ID_MAX => {
                    if block_last.is_some_and(|last| id <= last) {
                        return Err(headers.fault(Fault::BlockOrder));
                    }
                    block_last = Some(id);
                    let block = BlockHeader::read(&mut headers, id, record.major(), relation)?;
                    relation = Some(block.relation);
                    block_bytes +=
                        usize::from(block.data_length) + block.image.map_or(0, |image| usize::from(image.length));
                    payload = block_bytes;
                }
                ORIGIN => origin = Some(headers.u16("replication origin")?),
                TOP_XID => top_xid = Xid::new(headers.u32("top-level transaction")?),
                id @ (MAIN_SHORT | MAIN_LONG) => {
                    main_length = match id {
                        MAIN_SHORT => usize::from(headers.u8("main data length")?),
                        _ => headers.u32("main data length")? as usize,
                    };
                    payload = block_bytes.saturating_add(main_length);
                    break; // always the last part
                }
                id => return Err(headers.fault(Fault::UnknownPart(id))),
            }
        }
        if headers.rest().len() != payload {
            return Err(headers.fault(Fault::LengthsDisagree));
        }
        let header_bytes = record.body.len() - payload;
        let (head, mut rest) = (Cursor::new(record.body, record.lsn).bytes(header_bytes, "parts")?, headers);
        let payloads = rest.bytes(block_bytes, "block data")?;
        let main_data = rest.bytes(main_length, "main data")?;
        let blocks = Blocks {
            headers: Cursor::new(head, record.lsn),
            payloads: Cursor::new(payloads, record.lsn),
            major: record.major(),
            relation: None,
        };
        Ok(Self { main_data, top_xid, origin, blocks })
    }
}

/// Which page of which file a record touches, and what it holds of it.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Its number in the record.
    pub id: u8,
    /// The file.
    pub relation: RelFile,
    /// Which of the relation's forks.
    pub fork: Fork,
    /// The page, counted from the beginning of the fork.
    pub number: u32,
    /// The page is made anew at replay.
    pub will_init: bool,
    /// An image of the whole page.
    pub image: Option<Image<'a>>,
    /// What the resource manager wrote about this page.
    pub data: &'a [u8],
}

/// How a page image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ImageCompression {
    None,
    Pglz,
    Lz4,
    Zstd,
}

/// An image of a page, without the hole of zeros in its middle.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The bytes, compressed as said.
    pub bytes: &'a [u8],
    /// Where the hole begins in the page.
    pub hole_offset: u16,
    /// Bytes of the hole.
    pub hole_length: u16,
    /// How `bytes` are compressed.
    pub compression: ImageCompression,
    /// The image is restored at replay (otherwise it is there to be compared).
    pub apply: bool,
}

/// The block references of a record, read one by one.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    headers: Cursor<'a>,
    payloads: Cursor<'a>,
    major: WalMajor,
    relation: Option<RelFile>,
}

impl<'a> Blocks<'a> {
    fn read_next(&mut self) -> Result<Option<Block<'a>>, DecodeError> {
        while !self.headers.is_empty() {
            match self.headers.u8("part id")? {
                id @ 0..=BLOCK_ID_MAX => {
                    let header = BlockHeader::read(&mut self.headers, id, self.major, self.relation)?;
                    self.relation = Some(header.relation);
                    return self.with_payload(&header).map(Some);
                }
                ORIGIN => self.headers.skip(2, "replication origin")?,
                TOP_XID => self.headers.skip(4, "top-level transaction")?,
                _ => return Ok(None), // main data is the last part
            }
        }
        Ok(None)
    }

    fn with_payload(&mut self, header: &BlockHeader) -> Result<Block<'a>, DecodeError> {
        let image = match header.image {
            None => None,
            Some(image) => Some(Image {
                bytes: self.payloads.bytes(usize::from(image.length), "page image")?,
                hole_offset: image.hole_offset,
                hole_length: image.hole_length,
                compression: image.compression,
                apply: image.apply,
            }),
        };
        Ok(Block {
            id: header.id,
            relation: header.relation,
            fork: header.fork,
            number: header.number,
            will_init: header.will_init,
            image,
            data: self.payloads.bytes(usize::from(header.data_length), "block data")?,
        })
    }
}

impl<'a> Iterator for Blocks<'a> {
    type Item = Result<Block<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read_next().transpose()
    }
}

/// (Postgres: `XLogRecordBlockHeader` in `access/xlogrecord.h`.)
struct BlockHeader {
    id: u8,
    relation: RelFile,
    fork: Fork,
    number: u32,
    will_init: bool,
    data_length: u16,
    image: Option<ImageHeader>,
}

/// (Postgres: `XLogRecordBlockImageHeader` in `access/xlogrecord.h`.)
#[derive(Clone, Copy)]
struct ImageHeader {
    length: u16,
    hole_offset: u16,
    hole_length: u16,
    compression: ImageCompression,
    apply: bool,
}

const FORK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_RELATION: u8 = 0x80;
const HAS_HOLE: u8 = 0x01;

impl BlockHeader {
    fn read(
        cursor: &mut Cursor<'_>,
        id: u8,
        major: WalMajor,
        relation_before: Option<RelFile>,
    ) -> Result<Self, DecodeError> {
        let flags = cursor.u8("block flags")?;
        let fork = match flags & FORK {
            0 => Fork::Main,
            1 => Fork::Fsm,
            2 => Fork::Vm,
            3 => Fork::Init,
            _ => return Err(cursor.fault(Fault::Impossible("the fork of a block reference"))),
        };
        let data_length = cursor.u16("block data length")?;
        if (flags & HAS_DATA != 0) != (data_length > 0) {
            return Err(cursor.fault(Fault::Impossible("the data length of a block reference")));
        }
        let image = if flags & HAS_IMAGE != 0 { Some(ImageHeader::read(cursor, major)?) } else { None };
        let relation = if flags & SAME_RELATION != 0 {
            relation_before.ok_or_else(|| cursor.fault(Fault::BlockWithoutRelation))?
        } else {
            RelFile {
                tablespace: Oid(cursor.u32("tablespace of a block")?),
                database: Oid(cursor.u32("database of a block")?),
                number: cursor.u32("file of a block")?,
            }
        };
        let number = cursor.u32("block number")?;
        Ok(Self { id, relation, fork, number, will_init: flags & WILL_INIT != 0, data_length, image })
    }
}

impl ImageHeader {
    fn read(cursor: &mut Cursor<'_>, major: WalMajor) -> Result<Self, DecodeError> {
        let length = cursor.u16("image length")?;
        let hole_offset = cursor.u16("image hole offset")?;
        let info = cursor.u8("image flags")?;
        let [pglz, lz4, zstd] = major.image_compression_bits();
        let compression = match info & (pglz | lz4 | zstd) {
            0 => ImageCompression::None,
            bit if bit == pglz => ImageCompression::Pglz,
            bit if bit == lz4 => ImageCompression::Lz4,
            bit if bit == zstd => ImageCompression::Zstd,
            _ => return Err(cursor.fault(Fault::Impossible("the compression of a page image"))),
        };
        let block_size = BLOCK_SIZE as u16; // 8192
        let hole_length = match (info & HAS_HOLE != 0, compression) {
            (false, _) => 0,
            (true, ImageCompression::None) => block_size.saturating_sub(length),
            (true, _) => cursor.u16("image hole length")?,
        };
        let fits = length <= block_size && u32::from(hole_offset) + u32::from(hole_length) <= BLOCK_SIZE as u32;
        if !fits || (compression == ImageCompression::None && length.checked_add(hole_length) != Some(block_size)) {
            return Err(cursor.fault(Fault::Impossible("the length of a page image")));
        }
        Ok(Self { length, hole_offset, hole_length, compression, apply: info & major.image_apply_bit() != 0 })
    }
}
