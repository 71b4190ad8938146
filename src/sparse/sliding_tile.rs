//! Sliding tile attention over video: windows of whole 3-D tiles.

use std::ops::Range;
use std::sync::Arc;

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::Per;
use crate::mask::{Coverage, Mask};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::patterned::{Pattern, patterned};

/// The windows as a mask.
#[derive(Clone, Debug)]
pub(crate) struct Tiles {
    /// Tiles along each axis.
    grid: [usize; 3],
    /// Tokens of a tile.
    volume: usize,
    /// Tokens of the canvas, and of the text after it.
    image: usize,
    text: usize,
    /// One for all heads, or one a head.
    windows: Arc<[[usize; 3]]>,
}

impl Tiles {
    fn place(&self, tile: usize) -> [usize; 3] {
        let [_, b, c] = self.grid;
        [tile / (b * c), tile / c % b, tile % c]
    }

    /// The tiles that a tile sees along each axis.
    fn seen(&self, head: usize, tile: usize) -> [Range<usize>; 3] {
        let window = self.windows[if self.windows.len() == 1 { 0 } else { head }];
        let place = self.place(tile);
        std::array::from_fn(|axis| {
            let (n, half) = (self.grid[axis], window[axis] / 2);
            if window[axis] >= n || half >= n - half {
                return 0..n;
            }
            let centre = place[axis].clamp(half, n - 1 - half);
            centre - half..centre + half + 1
        })
    }

    fn sees(&self, head: usize, tile: usize, other: usize) -> bool {
        let seen = self.seen(head, tile);
        self.place(other).iter().zip(seen).all(|(y, seen)| seen.contains(y))
    }
}

impl Mask for Tiles {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        query.max(key) >= self.image || self.sees(site.head, query / self.volume, key / self.volume)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if queries.start >= self.image || keys.start >= self.image {
            return Coverage::Full;
        }
        let tile = |x: &Range<usize>| {
            let (first, last) = (x.start / self.volume, x.end.saturating_sub(1) / self.volume);
            (first == last && x.end <= self.image).then_some(first)
        };
        match (tile(&queries), tile(&keys)) {
            (Some(x), Some(y)) if self.sees(site.head, x, y) => Coverage::Full,
            (Some(_), Some(_)) => Coverage::Empty,
            _ => Coverage::Partial,
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        if query >= self.image {
            return u64::MAX;
        }
        // Tile by tile; what follows the canvas is seen.
        let (mut bits, mut at) = (0, first);
        while at < first + 64 {
            let end = if at < self.image { (at / self.volume + 1) * self.volume } else { usize::MAX };
            let end = end.min(first + 64);
            if self.visible(site, query, at) {
                bits |= (u64::MAX >> (64 - (end - at))) << (at - first);
            }
            at = end;
        }
        bits
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        let total = self.image + self.text;
        if dims.packed {
            return Err(Error::packed("canvas"));
        }
        if (dims.q_len, dims.kv_len) != (total, total) {
            let expected = format!(
                "{} tokens of a canvas and {} of text, as queries and as keys",
                self.image, self.text
            );
            return Err(Error::value("q", expected, format_args!("{} and {}", dims.q_len, dims.kv_len)));
        }
        if self.windows.len() != 1 && self.windows.len() != dims.q_heads {
            let expected = format!("{} heads, as many as there are windows", self.windows.len());
            return Err(Error::value("q", expected, dims.q_heads));
        }
        Ok(())
    }
}

impl Pattern for Tiles {
    fn per(&self) -> Per {
        if self.windows.len() == 1 { Per::Sequence } else { Per::Head }
    }

    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        if queries.end > self.image {
            return visit(0..site.kv_len);
        }
        let [_, nb, nc] = self.grid;
        for tile in queries.start / self.volume..queries.end.div_ceil(self.volume) {
            let [a, b, c] = self.seen(site.head, tile);
            for (x, y) in a.flat_map(|x| b.clone().map(move |y| (x, y))) {
                let row = (x * nb + y) * nc;
                visit((row + c.start) * self.volume..((row + c.end) * self.volume).min(site.kv_len));
            }
        }
        visit(self.image.min(site.kv_len)..site.kv_len);
    }
}

/// Sliding tile attention over video: windows of whole 3-D tiles.
///
/// ```text
/// tile x of a canvas of n tiles an axis sees tile y with
///     |clamp(x, k/2, n - 1 - k/2) - y| <= k/2      on all three axes (k/2 rounded down)
/// ```
///
/// Tokens lie tile by tile ([`order`](SlidingTile::order)), so that a tile is one
/// run of keys and nothing inside it is masked; text tokens after the canvas see
/// everything and are seen by all. At the border windows stop sliding, so every
/// query sees as many tiles. From "Fast Video Generation with Sliding Tile
/// Attention" (arXiv 2502.04507); an even window is as one more, as in its code.
/// A window that reaches over an axis is all of it.
///
/// All frames are there at once, with nothing to be cached: it runs over arrays.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair: the share of the tiles
/// in a window.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::SlidingTile};
/// use ndarray::{Array4, Axis};
///
/// // 4 x 8 x 8 tokens in tiles of 2 x 4 x 4; windows of 1 x 1 x 3 tiles: all along one axis.
/// let tiles = SlidingTile::builder([4, 8, 8], [1, 1, 3]).tile([2, 4, 4]).build()?;
/// let raster = Array4::from_shape_fn((1, 2, 256, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = raster.select(Axis(2), &tiles.order());
/// let out = tiles.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SlidingTile {
    config: Config<Tiles, Plain>,
    canvas: [usize; 3],
    tile: [usize; 3],
}

/// Builds a [`SlidingTile`].
#[derive(Clone, Debug)]
pub struct SlidingTileBuilder {
    canvas: [usize; 3],
    tile: [usize; 3],
    text: usize,
    windows: Vec<[usize; 3]>,
    scale: Option<f32>,
    isa: Option<crate::simd::Isa>,
}

impl SlidingTile {
    /// A canvas of frames, rows and columns of tokens; windows count tiles, by
    /// default of 6 x 8 x 8 tokens.
    pub fn builder(canvas: [usize; 3], window: [usize; 3]) -> SlidingTileBuilder {
        SlidingTileBuilder { canvas, tile: [6, 8, 8], text: 0, windows: vec![window], scale: None, isa: None }
    }

    /// For each token in the order of tiles its place on the canvas, in the
    /// order of frames, rows and columns.
    pub fn order(&self) -> Vec<usize> {
        let ([_, h, w], [a, b, c]) = (self.canvas, self.tile);
        let tiles = self.config.mask();
        (0..tiles.image)
            .map(|token| {
                let [x, y, z] = tiles.place(token / tiles.volume);
                let inner = token % tiles.volume;
                let (x, y, z) = (x * a + inner / (b * c), y * b + inner / c % b, z * c + inner % c);
                (x * h + y) * w + z
            })
            .collect()
    }
}

impl SlidingTileBuilder {
    /// Tokens of a tile along each axis.
    pub fn tile(self, tile: [usize; 3]) -> Self {
        Self { tile, ..self }
    }

    /// Tokens of text after the canvas.
    pub fn text(self, text: usize) -> Self {
        Self { text, ..self }
    }

    /// A window for each query head.
    pub fn windows(self, windows: Vec<[usize; 3]>) -> Self {
        Self { windows, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: crate::simd::Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for tiles of no tokens, a canvas that they do not divide (pad it,
    /// and leave the padding's rows out), windows of 0 tiles, none, or a scale that is not
    /// finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<SlidingTile> {
        let Self { canvas, tile, text, windows, scale, isa } = self;
        if tile.contains(&0) {
            return Err(Error::value("tile", "at least 1 token an axis", format_args!("{tile:?}")));
        }
        if (0..3).any(|axis| !canvas[axis].is_multiple_of(tile[axis])) {
            return Err(Error::value("canvas", format!("multiples of {tile:?}"), format_args!("{canvas:?}")));
        }
        if windows.is_empty() || windows.iter().flatten().any(|&k| k == 0) {
            return Err(Error::value("window", "at least 1 tile an axis", format_args!("{windows:?}")));
        }
        let product = |x: [usize; 3]| x[0].checked_mul(x[1])?.checked_mul(x[2]);
        let image = product(canvas).filter(|image| image.checked_add(text).is_some());
        let (Some(image), Some(volume)) = (image, product(tile)) else {
            return Err(Error::value("canvas", "tokens that can be counted", format_args!("{canvas:?}")));
        };
        let grid = std::array::from_fn(|axis| canvas[axis] / tile[axis]);
        let mask = Tiles { grid, volume, image, text, windows: windows.into() };
        let options = Options { mask, score: Plain, scale, isa };
        Ok(SlidingTile { config: options.build()?, canvas, tile })
    }
}

patterned!(SlidingTile);

exhibit! {
    SlidingTileExhibit of SlidingTile, "sparse", "sliding tile", "arXiv 2502.04507";
    "a window of 3 x 1 x 1 tiles of 1 x 2 x 4 tokens over a canvas 4 x 8 wide, and text that all see";
    not "where the tokens are no grid";
    tokens true;
    build(x, _) {
        let frames = x.q.dim().2 / 32;
        SlidingTile::builder([frames, 4, 8], [3, 1, 1]).tile([1, 2, 4]).text(x.q.dim().2 % 32)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(SlidingTile, SlidingTileExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::mask::mask_fn_per_head;
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn windows_are_masks() {
        for (canvas, tile, window, text) in [
            ([6, 8, 8], [2, 4, 4], [1, 1, 1], 0),
            ([6, 8, 8], [2, 4, 4], [3, 1, 2], 5),
            ([5, 2, 32], [1, 2, 8], [3, 1, 3], 0),
            ([4, 4, 4], [4, 4, 4], [1, 1, 1], 70),
            ([6, 8, 8], [2, 4, 4], [9, 9, 9], 3),
            ([9, 3, 9], [3, 3, 3], [2, 1, 1], 0),
        ] {
            let total: usize = canvas.iter().product::<usize>() + text;
            let x = Arrays::normal([1, 4, 2, total, total, 16, 8], 1);
            let tiles = SlidingTile::builder(canvas, window).tile(tile).text(text).build().unwrap();
            // By coordinates, as the paper has it.
            let order = tiles.order();
            let mask = mask_fn_per_head(move |_, i, j| {
                let (Some(&i), Some(&j)) = (order.get(i), order.get(j)) else { return true };
                let at = |x: usize| [x / canvas[2] / canvas[1], x / canvas[2] % canvas[1], x % canvas[2]];
                (0..3).all(|axis| {
                    let n = canvas[axis] / tile[axis];
                    let half = (window[axis] / 2) as i64;
                    let (x, y) = ((at(i)[axis] / tile[axis]) as i64, (at(j)[axis] / tile[axis]) as i64);
                    let last = n as i64 - 1 - half;
                    window[axis] >= n || last < half || (x.clamp(half, last) - y).abs() <= half
                })
            });
            let want = Dense::builder().mask(mask).build().unwrap().forward(x.qkv()).unwrap();
            testing::near(&format!("{canvas:?} {window:?}"), &tiles.forward(x.qkv()).unwrap(), &want);
            let (plan, _) = tiles.reference_select(x.qkv()).unwrap();
            assert_eq!(tiles.select(x.qkv()).unwrap(), plan, "{canvas:?} {window:?}");
        }
    }

    #[test]
    fn the_order_is_one() {
        let tiles = SlidingTile::builder([6, 8, 16], [1, 1, 1]).tile([3, 4, 8]).build().unwrap();
        let mut order = tiles.order();
        assert_eq!(order[..9], [0, 1, 2, 3, 4, 5, 6, 7, 16]);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..6 * 8 * 16));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: SlidingTileBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(SlidingTile::builder([7, 8, 8], [1, 1, 1])).starts_with("canvas: "));
        assert!(refusal(SlidingTile::builder([6, 8, 8], [1, 0, 1])).starts_with("window: "));
        let huge = SlidingTile::builder([1 << 40, 1 << 40, 8], [1, 1, 1]).tile([1, 1, 1]);
        assert!(refusal(huge).starts_with("canvas: "));
        let x = Arrays::normal([1, 4, 2, 10, 10, 4, 4], 1);
        let tiles = SlidingTile::builder([6, 8, 8], [1, 1, 1]).build().unwrap();
        assert!(tiles.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    }
}
