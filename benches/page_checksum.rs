//! What a core spends on a frame of a base backup: checking its pages, hashing, compressing; and on the way back.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use walguard::pg::BLOCK_SIZE;
use walguard::repo::backup::page_checksum;
use walguard::repo::frame::{Compressor, decompress};

/// Bytes of a frame.
const FRAME: usize = 1 << 20;

/// Pages with rows as `pgbench -i` makes them: small numbers, and text that is mostly blanks.
fn pages() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut pages = vec![b' '; FRAME];
    for row in pages.chunks_exact_mut(128) {
        row[..28].fill(0);
        row[..4].copy_from_slice(&random.u32(..1_000_000).to_le_bytes());
        row[8..12].copy_from_slice(&random.u32(..100_000).to_le_bytes());
    }
    pages
}

fn frame(criterion: &mut Criterion) {
    let pages = pages();
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Bytes(FRAME as u64));
    group.bench_function("check pages", |bencher| {
        bencher.iter(|| {
            let (pages, _) = pages.as_chunks::<BLOCK_SIZE>();
            (0..).zip(pages).map(|(block, page)| u64::from(page_checksum::compute(page, block))).sum::<u64>()
        });
    });
    group.bench_function("hash", |bencher| bencher.iter(|| blake3::hash(&pages)));
    let (mut compressor, mut stored) = (Compressor::new(1), Vec::new());
    group.bench_function("compress", |bencher| bencher.iter(|| compressor.compress_into(&pages, &mut stored)));
    group.bench_function("decompress", |bencher| bencher.iter(|| decompress(&stored, FRAME).expect("whole")));
    group.finish();
}

criterion_group!(benches, frame);
criterion_main!(benches);
