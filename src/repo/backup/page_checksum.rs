//! The checksum that Postgres keeps in each page of a relation's file. Pure.
//!
//! (Postgres: `pg_checksum_page` in `storage/checksum_impl.h`, the page header in `storage/bufpage.h`.)

use crate::pg::BLOCK_SIZE;
use crate::pg::Lsn;

/// A page is hashed as this many interleaved FNV-1a sums, which is what lets the compiler use vector instructions.
const LANES: usize = 32;
const LANE_ROW_BYTES: usize = LANES * 4;
const FNV_PRIME: u32 = 16_777_619;

/// Where each sum starts: random numbers chosen once by Postgres, so that pages of zeroes do not hash to the prime.
const OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// A page as it lies in the file.
pub type Page = [u8; BLOCK_SIZE];

/// The position of the WAL record that last changed the page (`pd_lsn`), `0/0` if none did.
pub fn lsn(page: &Page) -> Lsn {
    let half = |at: usize| u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]));
    Lsn::new(half(0) << 32 | half(4))
}

/// The checksum that stands in the page (`pd_checksum`).
pub const fn stored(page: &Page) -> u16 {
    u16::from_le_bytes([page[8], page[9]])
}

/// The checksum that should stand in the page, never 0.
///
/// `block` is the page's number in its relation, all of the relation's 1 GiB files counted: a page at the wrong place
/// has the wrong checksum.
pub fn compute(page: &Page, block: u32) -> u16 {
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<LANE_ROW_BYTES>();
    for (index, row) in rows.iter().enumerate() {
        let mut words = [0; LANES];
        for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        if index == 0 {
            words[2] &= 0xFFFF_0000; // pd_checksum itself counts as zero
        }
        add(&mut sums, &words);
    }
    add(&mut sums, &[0; LANES]);
    add(&mut sums, &[0; LANES]);
    let whole = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    (whole % 65_535) as u16 + 1 // at most 65,535
}

/// True for a page that a relation was extended by and that was never filled: all zero, and without a checksum.
pub fn is_new(page: &Page) -> bool {
    let (upper, rest) = (u16::from_le_bytes([page[14], page[15]]), page.as_chunks::<16>().0);
    upper == 0 && rest.iter().all(|bytes| u128::from_ne_bytes(*bytes) == 0)
}

/// True if the page is new, or its checksum is right. (Postgres: `PageIsVerified` in `storage/page/bufpage.c`.)
pub fn is_intact(page: &Page, block: u32) -> bool {
    stored(page) == compute(page, block) || is_new(page)
}

#[inline(always)]
fn add(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The algorithm as Postgres's source has it, one word after the other.
    fn by_the_book(page: &Page, block: u32) -> u16 {
        let mut page = *page;
        page[8..10].fill(0);
        let mut sums = OFFSETS;
        let mut add = |lane: usize, value: u32| {
            let mixed = sums[lane] ^ value;
            sums[lane] = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
        };
        for at in 0..BLOCK_SIZE / 4 {
            add(at % LANES, u32::from_le_bytes(page[at * 4..at * 4 + 4].try_into().unwrap()));
        }
        (0..2 * LANES).for_each(|n| add(n % LANES, 0));
        let whole = sums.iter().fold(0, |all, sum| all ^ sum);
        ((whole ^ block) % 65_535 + 1) as u16
    }

    fn page(seed: u64) -> Page {
        let mut random = fastrand::Rng::with_seed(seed);
        std::array::from_fn(|_| random.u8(..))
    }

    #[test]
    fn the_fast_sum_is_the_one_by_the_book() {
        for seed in 0..50 {
            let page = page(seed);
            assert_eq!(compute(&page, seed as u32 * 77_777), by_the_book(&page, seed as u32 * 77_777));
        }
        assert_eq!(compute(&[0; BLOCK_SIZE], 0), by_the_book(&[0; BLOCK_SIZE], 0));
    }

    #[test]
    fn the_sum_is_the_one_that_postgres_computes() {
        // Computed by a transcription that was checked against pages of real clusters.
        let page: Page = std::array::from_fn(|at| (at * at / 7) as u8);
        assert_eq!(compute(&page, 131_073), 11_922);
    }

    #[test]
    fn a_flipped_bit_or_another_place_is_noticed() {
        let mut page = page(1);
        let sum = compute(&page, 42);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        assert!(is_intact(&page, 42));
        assert!(!is_intact(&page, 43));
        page[5000] ^= 4;
        assert!(!is_intact(&page, 42));
    }

    #[test]
    fn a_page_that_was_never_filled_has_no_checksum() {
        let mut page = [0; BLOCK_SIZE];
        assert!(is_intact(&page, 7));
        page[8191] = 1;
        assert!(!is_intact(&page, 7));
    }

    #[test]
    fn the_header_is_read_as_postgres_writes_it() {
        let mut page = [0; BLOCK_SIZE];
        page[..10].copy_from_slice(&[0x16, 0, 0, 0, 0x48, 0xD8, 0x74, 0xB3, 0x34, 0x12]);
        assert_eq!(lsn(&page).to_string(), "16/B374D848");
        assert_eq!(stored(&page), 0x1234);
    }
}
