//! AMX: products of tiles of `bf16` with sums in `f32`.
//!
//! A tile is 16 rows of 64 bytes. The left operand of a product has the rows
//! of a matrix in the rows of a tile, 32 columns wide; of the right one, two
//! rows share a tile's row, their elements paired; sums take a tile of 16 by
//! 16. The instructions treat subnormal numbers as zero.
//!
//! Instructions are written as assembly, since their intrinsics are not
//! stable. What they leave in tiles lives from one block of assembly to the
//! next: nothing that is compiled for other instruction sets touches tiles.

/// Rows of a tile, and columns of a tile of sums.
pub(crate) const TILE: usize = 16;
/// Columns of a tile of the left operand, rows of one of the right.
pub(crate) const DEPTH: usize = 32;
/// `f32` that take the room of a tile's row.
pub(crate) const PAIRS: usize = DEPTH / 2;
/// `f32` that take the room of a tile.
pub(crate) const TILE_LEN: usize = TILE * PAIRS;
/// Rows and columns of a block of sums.
pub(crate) const BLOCK: usize = 2 * TILE;
/// The most parts that numbers are split into.
pub(crate) const MAX_PARTS: usize = 3;

/// Which parts of two operands are multiplied: an operand whose elements are
/// not `bf16` comes in parts that add up to it, the largest first. A part is at
/// most `2^-8` of the one before, `2^-7` where it was cut off.
#[derive(Debug)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies there")
)]
pub(crate) struct Order {
    /// Parts of the left operand and of the right one.
    parts: [usize; 2],
    /// Pairs of parts. A pass goes over all steps with some of them. Small
    /// products come in an earlier pass where their sum is to lose nothing to
    /// the large ones.
    passes: &'static [&'static [Pair]],
}

/// A part of the left operand and one of the right operand.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies there")
)]
struct Pair {
    parts: [usize; 2],
    /// Which of them is not that of the pair before in the same step.
    new: [bool; 2],
}

const fn both(left: usize, right: usize) -> Pair {
    Pair { parts: [left, right], new: [true, true] }
}

/// With the right part of the pair before.
const fn left(left: usize, right: usize) -> Pair {
    Pair { parts: [left, right], new: [true, false] }
}

/// With the left part of the pair before.
const fn right(left: usize, right: usize) -> Pair {
    Pair { parts: [left, right], new: [false, true] }
}

impl Order {
    const fn new(parts: [usize; 2], passes: &'static [&'static [Pair]]) -> Self {
        Self { parts, passes }
    }

    /// For queries and keys of so many parts: what is left out is at most
    /// `2^-23` of a product.
    pub(crate) const fn of_scores(parts: usize) -> &'static Self {
        const ONE: Order = Order::new([1, 1], &[&[both(0, 0)]]);
        match parts {
            1 => &ONE,
            2 => &TWO,
            _ => &THREE,
        }
    }

    /// For weights and values of so many parts: what is left out of a product
    /// is at most `2^-17` of it where the weights have two parts, and `2^-22`
    /// where they have three.
    pub(crate) const fn of_values(weights: usize, values: usize) -> &'static Self {
        const ONE: Order = Order::new([2, 1], &[&[both(1, 0), left(0, 0)]]);
        const ONE_MORE: Order = Order::new([3, 1], &[&[both(2, 0), left(1, 0), left(0, 0)]]);
        const TWO_MORE: Order =
            Order::new([3, 2], &[&[both(2, 0), left(1, 0), right(1, 1), left(0, 1), right(0, 0)]]);
        match (weights, values) {
            (2, 1) => &ONE,
            (_, 1) => &ONE_MORE,
            (2, 2) => &TWO,
            (_, 2) => &TWO_MORE,
            _ => &THREE,
        }
    }

    /// TileOps of a block of columns that takes so many steps.
    pub(crate) fn count(&self, steps: usize) -> usize {
        steps * self.passes.iter().map(|pass| pass.len()).sum::<usize>()
    }

    /// Writes the moves of such a block down, where the tiles of the left
    /// operand are `next` apart.
    pub(crate) fn moves<'a>(&self, steps: usize, next: usize, room: &'a mut [TileOp]) -> TileOps<'a> {
        let [of_a, of_b] = self.parts;
        let mut n = 0;
        for pass in self.passes {
            for step in 0..steps {
                for pair in *pass {
                    let [a, b] = pair.parts;
                    let [new_a, new_b] = pair.new;
                    let (first, last) = (n == 0, n + 1 == self.count(steps));
                    let mut flags = 0;
                    for (flag, set) in [(NEW_A, new_a), (NEW_B, new_b), (FIRST, first), (LAST, last)] {
                        flags |= u32::from(set) * flag;
                    }
                    let a = (step * of_a + a) * next;
                    let b = (step * of_b + b) * 2 * TILE_LEN;
                    room[n] = TileOp { a: a as u32, b: b as u32, flags };
                    n += 1;
                }
            }
        }
        let lens = if n == 0 { [0; 2] } else { [(steps * of_a - 1) * next, steps * of_b * 2 * TILE_LEN] };
        TileOps { list: &room[..n], lens }
    }
}

/// What is done for one pair of parts in one step: tiles are loaded and
/// multiplied, at the first one of a block of columns the sums are loaded and
/// after the last one stored.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct TileOp {
    /// Where the tiles of both operands are.
    a: u32,
    b: u32,
    flags: u32,
}

const FIRST: u32 = 1;
const LAST: u32 = 2;
/// The tile of the left operand is not that of the move before.
const NEW_A: u32 = 4;
/// The same of the right operand.
const NEW_B: u32 = 8;

/// The moves of a block of columns.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies there")
)]
pub(crate) struct TileOps<'a> {
    list: &'a [TileOp],
    /// Where the last tile of the left operand starts, and where those of the
    /// right operand end.
    lens: [usize; 2],
}

/// Two parts of each, none left out.
const TWO: Order = Order::new([2, 2], &[&[both(1, 1), right(1, 0), left(0, 0), right(0, 1)]]);
/// Three parts of each.
const THREE: Order =
    Order::new([3, 3], &[&[both(0, 2), right(0, 1), left(1, 1), right(1, 0), left(2, 0)], &[both(0, 0)]]);

/// A product of up to [`BLOCK`] rows with some blocks of as many columns. Both
/// operands are pairs of `bf16` that are kept as the bits of an `f32`, in tiles.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies there")
)]
pub(crate) struct Operands<'a> {
    /// Tiles of the left operand, a step's parts one after the other, the
    /// steps after another.
    pub(crate) a: &'a [f32],
    /// From a row of such a tile to the next one.
    pub(crate) row: usize,
    /// From the tiles of the first [`TILE`] rows to those of the others.
    pub(crate) lower: usize,
    /// Tiles of the right operand in the same order, two columns of them side
    /// by side.
    pub(crate) b: &'a [f32],
    /// From the tiles of a block of columns to those of the next one.
    pub(crate) next_block: usize,
    pub(crate) moves: TileOps<'a>,
    /// Rows that count: the others are left out where they are a tile.
    pub(crate) rows: usize,
    /// Blocks of columns.
    pub(crate) blocks: usize,
    /// From a row of the sums to the next one.
    pub(crate) ldc: usize,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod available {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    use super::{BLOCK, FIRST, LAST, NEW_A, NEW_B, Operands, PAIRS, TILE, TILE_LEN, TileOp};
    use crate::simd::avx512::Avx512;
    use crate::simd::{Kernel, Simd};

    /// Proof that the CPU has AMX for `bf16` besides AVX-512, and that the
    /// process may use it.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Amx(Avx512);

    impl Amx {
        /// The token, if the CPU has the instructions and the system allows
        /// the process to use them.
        #[inline]
        pub(crate) fn detect() -> Option<Self> {
            static HAS: OnceLock<bool> = OnceLock::new();
            let avx512 = Avx512::detect()?;
            HAS.get_or_init(|| in_cpu() && saved() && permitted()).then_some(Self(avx512))
        }

        /// Runs `kernel` compiled with AVX-512.
        #[inline]
        pub(crate) fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
            self.0.vectorize(kernel)
        }

        /// Tiles to multiply with, until they are dropped.
        ///
        /// No other [`Tiles`] of the same thread may be made or dropped in
        /// between: no code of a caller's may run.
        #[inline(always)]
        pub(crate) fn tiles(self) -> Tiles {
            // Palette 1; all tiles have 16 rows of 64 bytes.
            #[repr(C, align(64))]
            struct Config([u8; 64]);
            const CONFIG: Config = {
                let mut bytes = [0; 64];
                bytes[0] = 1;
                let mut tile = 0;
                while tile < 8 {
                    bytes[16 + 2 * tile] = 64;
                    bytes[48 + tile] = TILE as u8;
                    tile += 1;
                }
                Config(bytes)
            };
            static CONFIGURED: Config = CONFIG;
            // SAFETY: a token exists only where the instruction does, and the
            // configuration is valid.
            unsafe {
                asm!("ldtilecfg [{0}]", in(reg) CONFIGURED.0.as_ptr(), options(nostack, readonly, preserves_flags));
            }
            Tiles(PhantomData)
        }
    }

    /// Whether the CPU has AMX with tiles of `bf16`.
    fn in_cpu() -> bool {
        #[allow(unused_unsafe, reason = "safe from some version of Rust on")]
        // SAFETY: every x86-64 CPU has the instruction.
        let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
        let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
        bf16 & tile == 1
    }

    /// Whether the system saves tiles where it switches between threads.
    fn saved() -> bool {
        #[allow(unused_unsafe, reason = "safe from some version of Rust on")]
        // SAFETY: every x86-64 CPU has the instruction.
        if unsafe { __cpuid(1) }.ecx >> 27 & 1 == 0 {
            return false;
        }
        let low: u32;
        // SAFETY: the bit above says that there is the instruction.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags));
        }
        low >> 17 & 3 == 3
    }

    /// Asks Linux for the permission to use tiles: for the whole process,
    /// threads that run already included.
    fn permitted() -> bool {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: the call takes two numbers and touches no memory of ours.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    /// Tiles that have been configured, on this thread.
    #[derive(Debug)]
    pub(crate) struct Tiles(PhantomData<*const ()>);

    impl Drop for Tiles {
        #[inline(always)]
        fn drop(&mut self) {
            // SAFETY: whoever made the tiles had a token.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
        }
    }

    /// Loads tile `T` from rows `stride` bytes apart.
    #[inline(always)]
    unsafe fn load<const T: usize>(from: *const f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from,
                stride = in(reg) stride, options(nostack, readonly, preserves_flags));
        }
    }

    /// Stores tile `T` to rows `stride` bytes apart.
    #[inline(always)]
    unsafe fn store<const T: usize>(to: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to,
                stride = in(reg) stride, options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn zero<const T: usize>() {
        // SAFETY: the caller's.
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nomem, nostack, preserves_flags)) }
    }

    /// Tile `C` plus tile `A` times tile `B`.
    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>() {
        // SAFETY: the caller's.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nomem, nostack, preserves_flags));
        }
    }

    /// A product under way, which is made one move of one half of the rows at
    /// a time, since a CPU has few tiles in flight: other work is to come in
    /// between, but no other product. With `ADD` it is added to what is there.
    #[derive(Debug)]
    pub(crate) struct Product<'a, const ADD: bool> {
        of: Operands<'a>,
        /// Twice the next move, plus one where it is the lower rows' turn.
        at: usize,
        block: usize,
        /// Halves of moves that are left.
        left: usize,
        /// The least length of the sums.
        sums: usize,
    }

    impl<'a, const ADD: bool> Product<'a, ADD> {
        /// Checks the operands.
        #[inline(always)]
        pub(crate) fn new(of: Operands<'a>) -> Self {
            let lower = usize::from(of.rows > TILE);
            let left = of.blocks * of.moves.list.len() * (1 + lower);
            if left > 0 {
                let [last, right] = of.moves.lens;
                assert!(last + lower * of.lower + (TILE - 1) * of.row + PAIRS <= of.a.len());
                assert!((of.blocks - 1) * of.next_block + right <= of.b.len());
                assert!(of.rows <= BLOCK && of.blocks * BLOCK <= of.ldc);
            }
            let sums = ((1 + lower) * TILE - 1) * of.ldc + of.blocks * BLOCK;
            Self { of, at: 0, block: 0, left, sums }
        }

        /// Halves of moves that are left.
        #[inline(always)]
        pub(crate) fn left(&self) -> usize {
            self.left
        }

        /// Makes the next so many halves of moves, or those that are left. The
        /// sums are in `c` from row to row `ldc` apart.
        #[inline(always)]
        pub(crate) fn advance(&mut self, _: &Tiles, count: usize, c: &mut [f32]) {
            let count = count.min(self.left);
            if count == 0 {
                return;
            }
            assert!(self.sums <= c.len());
            self.left -= count;
            let of = &self.of;
            let lower = usize::from(of.rows > TILE);
            for _ in 0..count {
                let TileOp { a, b, flags } = of.moves.list[self.at / 2];
                // SAFETY: a token was had, and `new` has checked that the
                // operands have the tiles of all moves; so have the sums.
                unsafe {
                    let c = c.as_mut_ptr().add(self.block * BLOCK);
                    let a = of.a.as_ptr().add(a as usize);
                    if self.at.is_multiple_of(2) {
                        if flags & NEW_B != 0 {
                            const RIGHT: usize = PAIRS * size_of::<f32>();
                            let b = of.b.as_ptr().add(self.block * of.next_block + b as usize);
                            load::<6>(b, RIGHT);
                            load::<7>(b.add(TILE_LEN), RIGHT);
                        }
                        half::<0, 1, 4, ADD>(a, of.row, c, of.ldc, flags);
                    } else {
                        half::<2, 3, 5, ADD>(a.add(of.lower), of.row, c.add(TILE * of.ldc), of.ldc, flags);
                    }
                }
                self.at += 2 - lower;
                if self.at == 2 * of.moves.list.len() {
                    (self.at, self.block) = (0, self.block + 1);
                }
            }
        }
    }

    /// A move of the rows of one tile: adds the products of tile `A` with tiles
    /// 6 and 7 to the sums in tiles `L` and `R`.
    #[inline(always)]
    unsafe fn half<const L: usize, const R: usize, const A: usize, const ADD: bool>(
        a: *const f32,
        row: usize,
        c: *mut f32,
        ldc: usize,
        flags: u32,
    ) {
        let (row, ldc) = (row * size_of::<f32>(), ldc * size_of::<f32>());
        // SAFETY: the caller's.
        unsafe {
            if flags & FIRST != 0 {
                if ADD {
                    load::<L>(c, ldc);
                    load::<R>(c.add(TILE), ldc);
                } else {
                    zero::<L>();
                    zero::<R>();
                }
            }
            if flags & NEW_A != 0 {
                load::<A>(a, row);
            }
            dot::<L, A, 6>();
            dot::<R, A, 7>();
            if flags & LAST != 0 {
                store::<L>(c, ldc);
                store::<R>(c.add(TILE), ldc);
            }
        }
    }
}
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use available::{Amx, Product, Tiles};

/// What other machines have: nothing.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod missing {
    use std::marker::PhantomData;

    use super::Operands;
    use crate::simd::Kernel;

    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Amx {}

    impl Amx {
        #[inline]
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn vectorize<K: Kernel>(self, _: K) -> K::Output {
            match self {}
        }

        pub(crate) fn tiles(self) -> Tiles {
            match self {}
        }
    }

    #[derive(Debug)]
    pub(crate) enum Tiles {}

    #[derive(Debug)]
    pub(crate) struct Product<'a, const ADD: bool>(PhantomData<&'a [f32]>);

    impl<'a, const ADD: bool> Product<'a, ADD> {
        pub(crate) fn new(_: Operands<'a>) -> Self {
            Self(PhantomData)
        }

        pub(crate) fn left(&self) -> usize {
            0
        }

        pub(crate) fn advance(&mut self, tiles: &Tiles, _: usize, _: &mut [f32]) {
            match *tiles {}
        }
    }
}
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) use missing::{Amx, Product, Tiles};
