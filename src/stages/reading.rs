//! Rows that read other rows: attention with its projections, a feed-forward layer,
//! and a mean of what comes out.
//!
//! ```text
//! y = x + W_O attention(W_Q norm(x), W_K norm'(z), W_V norm'(z))
//! y <- y + W_2 f(W_1 norm''(y) + b_1) + b_2       f = gelu, or a * gelu(b) of its halves
//! e = mean y / |mean y|
//! ```

use ndarray::{Array1, Array2, Array4, ArrayView1, ArrayView4, Axis, concatenate, s};

use crate::definition::attend::attend;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::reading::Reading;
use crate::input::{Dims, Input, Lengths, Qkv, countable};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::simd::exp::gelu;
use crate::simd::mem::{Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::norm::LayerNorm;
use crate::stages::pass::{Out, Pass, Scratch};
use crate::stages::row::{self, RowMap};
use crate::stages::{side, sum};

/// A linear layer: `[out, in]`, and what it adds.
pub type Linear = (Array2<f32>, Option<Array1<f32>>);

/// Attention with its projections. Rows that read have `dim` elements, those that are
/// read `width`.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossAttention {
    /// How many heads the projections have.
    pub heads: usize,
    /// Of the rows that read, before their projection.
    pub norm: Option<LayerNorm>,
    /// Of the rows that are read.
    pub norm_read: Option<LayerNorm>,
    /// `[heads * head_dim, dim]`
    pub query: Linear,
    /// `[heads * head_dim, width]`
    pub key: Linear,
    /// `[heads * value_dim, width]`
    pub value: Linear,
    /// `[dim, heads * value_dim]`
    pub out: Linear,
}

/// A feed-forward layer behind its norm.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedForward {
    /// Of the rows before it.
    pub norm: LayerNorm,
    /// `[inner, dim]`, or `[2 inner, dim]` with gates: values first.
    pub up: Linear,
    /// `[dim, inner]`
    pub down: Linear,
    /// Whether values are multiplied by GELU of gates (GEGLU, arXiv 2002.05202);
    /// otherwise they become GELU of themselves.
    pub gated: bool,
}

/// GELU of a row; of its second half, times the first.
#[derive(Clone, Copy, Debug)]
struct Activation {
    gated: bool,
}

impl RowMap for Activation {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        if !self.gated {
            for x in row.chunks_mut(S::LANES) {
                let y = gelu(s, s.load_tail(x));
                s.store_tail(x, y);
            }
            return;
        }
        let (values, gates) = row.split_at_mut(row.len() / 2);
        for (x, gate) in values.chunks_mut(S::LANES).zip(gates.chunks(S::LANES)) {
            let y = s.mul(s.load_tail(x), gelu(s, s.load_tail(gate)));
            s.store_tail(x, y);
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let inner = x.len() / 2;
        match self.gated {
            false => x.iter().map(|x| x.gelu()).collect(),
            true => (0..inner).map(|c| (x[c] * x[inner + c].gelu()).stored()).collect(),
        }
    }
}

/// Rows that read others, checked and ready.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    config: Config<Unmasked, Plain>,
    heads: usize,
    norms: [Option<LayerNorm>; 2],
    query: Affine,
    /// Keys and values.
    read: [Affine; 2],
    out: Affine,
    forward: Option<(LayerNorm, Affine, Activation, Affine)>,
}

impl Reader {
    pub(crate) fn new(
        cross: &CrossAttention,
        forward: Option<&FeedForward>,
        scale: Option<f32>,
        isa: Isa,
    ) -> Result<Self> {
        let CrossAttention { heads, norm, norm_read, query, key, value, out } = cross;
        let of = |argument, (weights, bias): &Linear| Affine::new(argument, weights, bias.as_ref());
        let made = [of("query", query)?, of("key", key)?, of("value", value)?, of("out", out)?];
        let [[dim, keys], [width, _], [_, values], _] = made.each_ref().map(Affine::sides);
        let expected = [("key", [width, keys]), ("value", [width, values]), ("out", [values, dim])];
        for ((argument, [inner, outer]), layer) in expected.into_iter().zip(&made[1..]) {
            if layer.sides() != [inner, outer] {
                let [have, made] = layer.sides();
                return Err(Error::shape(argument, format!("[out, in] = [{outer}, {inner}]"), &[made, have]));
            }
        }
        for (argument, rows) in [("query", keys), ("value", values)] {
            if *heads == 0 || !rows.is_multiple_of(*heads) {
                return Err(Error::value(
                    "heads",
                    format!("a divisor of the {rows} rows of {argument}"),
                    heads,
                ));
            }
        }
        let checked = |argument, norm: &Option<LayerNorm>, dim| {
            norm.as_ref().map(|norm| norm.checked(argument, dim)).transpose()
        };
        let norms = [checked("norm", norm, dim)?, checked("norm_read", norm_read, width)?];
        let forward = forward.map(|FeedForward { norm, up, down, gated }| {
            let (up, down) = (of("up", up)?, of("down", down)?);
            let inner = up.sides()[1] / if *gated { 2 } else { 1 };
            for (argument, fits) in [
                ("up", up.sides()[0] == dim && (!gated || up.sides()[1].is_multiple_of(2))),
                ("down", down.sides() == [inner, dim]),
            ] {
                if !fits {
                    let expected = format!("[inner, {dim}], twice as many with gates, and [{dim}, inner]");
                    let layer = if argument == "up" { &up } else { &down };
                    let [have, made] = layer.sides();
                    return Err(Error::shape(argument, expected, &[made, have]));
                }
            }
            Ok((norm.checked("norm", dim)?, up, Activation { gated: *gated }, down))
        });
        let config = Options { scale, isa: Some(isa), ..Options::default() }.build()?;
        let [query, key, value, out] = made;
        Ok(Self {
            config,
            heads: *heads,
            norms,
            query,
            read: [key, value],
            out,
            forward: forward.transpose()?,
        })
    }

    /// Elements of the rows that read, and of those that are read.
    pub(crate) fn sides(&self) -> [usize; 2] {
        [self.query.sides()[0], self.read[0].sides()[0]]
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        let forward = self
            .forward
            .iter()
            .map(|(norm, up, _, down)| 2 * norm.gain.len() * size_of::<f32>() + up.bytes() + down.bytes());
        let read: usize = self.read.iter().map(Affine::bytes).sum();
        self.query.bytes() + read + self.out.bytes() + forward.sum::<usize>()
    }

    /// Refuses an array of other rows to be read.
    pub(crate) fn check_width(&self, argument: &'static str, x: &Array2<f32>) -> Result<()> {
        let want = self.sides()[1];
        if x.dim().1 == want {
            return Ok(());
        }
        Err(Error::shape(argument, format!("[_, width] = [_, {want}]"), x.shape()))
    }

    /// Refuses rows of other elements, and so many of them and of tokens that what is
    /// made of them cannot be counted.
    pub(crate) fn check_rows<T>(
        &self,
        argument: &'static str,
        x: &ArrayView4<'_, T>,
        tokens: usize,
    ) -> Result<()> {
        let ((batch, heads, len, part), dim) = (x.dim(), self.sides()[0]);
        if heads.checked_mul(part) != Some(dim) {
            return Err(Error::shape(
                argument,
                format!("heads and dim of {dim} elements together"),
                x.shape(),
            ));
        }
        self.check_count(batch, len, tokens)
    }

    fn check_count(&self, batch: usize, rows: usize, tokens: usize) -> Result<()> {
        let up = self.forward.as_ref().map_or(0, |(_, up, ..)| up.sides()[1]);
        let layers = [&self.query, &self.read[0], &self.read[1], &self.out];
        let wide: usize = layers.iter().map(|layer| layer.sides().iter().sum::<usize>()).sum();
        if countable(&[batch, rows.saturating_add(tokens), wide + up, 1 << 10]) {
            return Ok(());
        }
        Err(Error::too_large("rows", format_args!("{batch} times {rows} rows and {tokens} tokens")))
    }

    fn isa(&self) -> Isa {
        self.config.isa()
    }

    /// Rows through a norm, if there is one.
    fn normed<'a>(
        &self,
        pass: &mut Pass<'a>,
        norm: &Option<LayerNorm>,
        x: ArrayView4<'_, f32>,
    ) -> Result<Scratch<'a>> {
        let mut to = pass.rows(x.dim())?;
        match norm {
            Some(norm) => row::run(pass, self.isa(), x, norm, to.view_mut()),
            None => sum::of(pass, self.isa(), &[x], to.view_mut()),
        }
        Ok(to)
    }

    /// Keys and values of rows `[batch, 1, tokens, width]`, side by side.
    pub(crate) fn keys_and_values<'a>(
        &self,
        pass: &mut Pass<'a>,
        z: ArrayView4<'_, f32>,
    ) -> Result<[Scratch<'a>; 2]> {
        let z = self.normed(pass, &self.norms[1], z)?;
        let [key, value] = &self.read;
        Ok([key.run(pass, self.isa(), z.view())?, value.run(pass, self.isa(), z.view())?])
    }

    /// Heads, and elements of a key and of a value.
    pub(crate) fn head_dims(&self) -> (usize, [usize; 2]) {
        (self.heads, self.read.each_ref().map(|layer| layer.sides()[1] / self.heads))
    }

    /// Writes what rows `[batch, heads, len, dim]` become that read keys and values
    /// `[batch | 1, heads, tokens, dim]`, of which `lengths` say how many there are;
    /// with `pooled`, one row a batch entry of so many of the first rows. Rows that are
    /// the same for all of the batch (a stride of 0) are projected once.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: ArrayView4<'_, T>,
        [k, v]: [ArrayView4<'_, f32>; 2],
        lengths: Lengths<'_>,
        pooled: Option<&(dyn Fn(usize) -> usize + Sync)>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let ((batch, split, n, part), isa) = (x.dim(), self.isa());
        let (heads, [key, value]) = self.head_dims();
        let first = if x.strides()[0] == 0 { batch.min(1) } else { batch };
        let rows = side::run(pass, isa, x.reborrow())?;
        let q = {
            let own = rows.view().slice_move(s![..first, .., .., ..]);
            let normed = self.normed(pass, &self.norms[0], own)?;
            self.query.run(pass, isa, normed.view())?
        };
        let mut read = pass.rows((batch, 1, n, heads * value))?;
        let tokens = k.dim().2;
        let (q, to) = (q.of_heads(heads, key), read.of_heads_mut(heads, value));
        let views = [(&q, n, key), (&k, tokens, key), (&v, tokens, value)];
        let [Some(q), Some(k), Some(v)] = views.map(|(x, len, dim)| x.broadcast((batch, heads, len, dim)))
        else {
            return Err(Error::too_large("rows", format_args!("{batch} times {n}")));
        };
        let call = Qkv { lengths, ..Qkv::<f32>::new(q, k, v) };
        self.config.attend(pass, call, to)?;
        let read = self.out.run(pass, isa, read.view())?;
        let mut parts = [rows, read];
        if let Some((norm, up, activation, down)) = &self.forward {
            let mut y = pass.rows((batch, 1, n, split * part))?;
            sum::of(pass, isa, &parts.each_ref().map(|x| x.view()), y.view_mut());
            let mut normed = pass.rows(y.dim())?;
            row::run(pass, isa, y.view(), norm, normed.view_mut());
            let up = up.run(pass, isa, normed.view())?;
            let mut inner = pass.rows((batch, 1, n, down.sides()[0]))?;
            row::run(pass, isa, up.view(), activation, inner.view_mut());
            parts = [y, down.run(pass, isa, inner.view())?];
        }
        let Some(count) = pooled else {
            sum::of(pass, isa, &parts.each_ref().map(|x| x.of_heads(split, part)), out);
            return Ok(());
        };
        let mut y = pass.rows((batch, 1, n, split * part))?;
        sum::of(pass, isa, &parts.each_ref().map(|x| x.view()), y.view_mut());
        let mut mean = pass.rows((batch, 1, 1, split * part))?;
        unit_means(pass, isa, &y, count, &mut mean);
        sum::of(pass, isa, &[mean.of_heads(split, part)], out);
        Ok(())
    }

    /// The sizes of latents that read tokens, to which `places` are added.
    pub(crate) fn check<T: Element>(&self, x: &Reading<'_, T>, places: Option<&Array2<f32>>) -> Result<Dims> {
        let (dims, (_, tokens, width)) = (x.dims()?, x.tokens.dim());
        self.check_rows("latents", &x.latents, tokens)?;
        let want = self.sides()[1];
        let len = places.map_or(tokens, |places| places.dim().0);
        if (tokens, width) != (len, want) {
            let expected = format!("[batch, tokens, width] = [_, {len}, {want}]");
            return Err(Error::shape("tokens", expected, x.tokens.shape()));
        }
        Ok(dims)
    }

    /// Latents read tokens, to which `places` are added.
    pub(crate) fn read<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: &Reading<'_, T>,
        places: Option<&Array2<f32>>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.check(x, places)?;
        let (batch, _, latents, _) = x.latents.dim();
        if [batch, self.sides()[0]].contains(&0) {
            return Ok(());
        }
        let (isa, (heads, [key, value])) = (self.isa(), self.head_dims());
        let tokens = x.tokens.reborrow().insert_axis(Axis(1));
        let first = if tokens.strides()[0] == 0 { 1 } else { batch };
        let mut z = side::run(pass, isa, tokens.slice_move(s![..first, .., .., ..]))?;
        if let Some(places) = places {
            let mut placed = pass.rows(z.dim())?;
            let (len, width) = places.dim();
            let same = places.broadcast((first, 1, len, width));
            let same = same.ok_or_else(|| Error::too_large("tokens", format_args!("{first} times {len}")))?;
            sum::of(pass, isa, &[z.view(), same], placed.view_mut());
            z = placed;
        }
        let [k, v] = self.keys_and_values(pass, z.view())?;
        let read = [k.of_heads(heads, key), v.of_heads(heads, value)];
        let lengths = x.lengths.map_or(Lengths::Full, Lengths::Keys);
        let all = |_: usize| latents;
        let pooled: Option<&(dyn Fn(usize) -> usize + Sync)> = if x.pooled { Some(&all) } else { None };
        self.run(pass, x.latents.reborrow(), read, lengths, pooled, out)
    }

    /// The definition of [`read`](Self::read).
    pub(crate) fn define_reading<R: Real, T: Element>(
        &self,
        x: &Reading<'_, T>,
        places: Option<&Array2<f32>>,
    ) -> Result<Array4<R>> {
        self.check(x, places)?;
        let mut out = Array4::from_elem(x.out_dim()?, R::of(0.0));
        for (b, mut out) in out.outer_iter_mut().enumerate() {
            let len = x.lengths.map_or(x.tokens.dim().1, |lengths| lengths[b]);
            let tokens = x.tokens.slice(s![b, ..len, ..]);
            let tokens = Array2::from_shape_fn(tokens.dim(), |at| {
                let place = places.map_or(0.0, |places| f64::from(places[at]));
                (R::of(tokens[at].to_f64()) + R::of(place)).stored()
            });
            let y = self.define(&side::define(x.latents.index_axis(Axis(0), b)), &tokens);
            side::spread(&if x.pooled { Self::define_pooled(&y) } else { y }, &mut out);
        }
        Ok(out)
    }

    /// The definition: rows of one batch entry that read others.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, z: &Array2<R>) -> Array2<R> {
        let normed = |x: &Array2<R>, norm: &Option<LayerNorm>| {
            norm.as_ref().map_or(x.clone(), |norm| row::define(norm, x))
        };
        let (q, z) = (self.query.define(&normed(x, &self.norms[0])), normed(z, &self.norms[1]));
        let [k, v] = self.read.each_ref().map(|layer| layer.define(&z));
        let (heads, [key, value]) = self.head_dims();
        let read = (0..heads).map(|h| {
            let of = |x: &Array2<R>, dim: usize| x.slice(s![.., h * dim..(h + 1) * dim]).to_owned();
            let call = [&of(&q, key), &of(&k, key), &of(&v, value)];
            attend(call, self.config.scale_of(key), |_, _| true, |_, _, score| score).mapv(R::stored)
        });
        let read: Vec<Array2<R>> = read.collect();
        let read: Vec<_> = read.iter().map(|x| x.view()).collect();
        let read = concatenate(Axis(1), &read).expect("as many rows in each head");
        let y = plus(x, &self.out.define(&read));
        match &self.forward {
            None => y,
            Some((norm, up, activation, down)) => {
                plus(&y, &down.define(&row::define(activation, &up.define(&row::define(norm, &y)))))
            }
        }
    }

    /// The definition of what is pooled: the mean of rows, of unit length; 0 where there
    /// are none, or nothing is left of them.
    pub(crate) fn define_pooled<R: Real>(y: &Array2<R>) -> Array2<R> {
        let n = R::of(y.dim().0.max(1) as f64);
        let mean: Array1<R> =
            y.columns().into_iter().map(|x| (R::sum(x.iter().copied()) / n).stored()).collect();
        let length = R::dot(mean.iter().map(|&x| (x, x))).sqrt();
        let unit = |x: R| if length.value() == 0.0 { R::of(0.0) } else { x / length };
        mean.mapv(unit).insert_axis(Axis(0))
    }
}

fn plus<R: Real>(a: &Array2<R>, b: &Array2<R>) -> Array2<R> {
    Array2::from_shape_fn(a.dim(), |at| (a[at] + b[at]).stored())
}

/// Means of the first rows of each batch entry, of unit length.
fn unit_means(
    pass: &mut Pass<'_>,
    isa: Isa,
    y: &Scratch<'_>,
    count: &(dyn Fn(usize) -> usize + Sync),
    to: &mut Scratch<'_>,
) {
    let ((batch, _, n, cols), stride, claims) = (y.dim(), y.stride(), claim_words(to.dim().0));
    pass.stage(
        || 0,
        bytes_for::<u64>(claims),
        |mut arena| {
            let to = Parts::new(to.numbers_mut(), stride, arena.take(claims));
            let start = |_| ();
            parallel::for_each(parallel::threads(), batch, start, |(), b| {
                let rows = &y.numbers()[b * n * stride..][..count(b).min(n) * stride];
                isa.dispatch(UnitMean { rows, stride, cols, mean: to.take(b) });
            });
        },
    );
}

struct UnitMean<'a> {
    rows: &'a [f32],
    stride: usize,
    cols: usize,
    mean: &'a mut [f32],
}

impl Kernel for UnitMean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, stride, cols, mean } = self;
        mean.fill(0.0);
        let n = (rows.len() / stride.max(1)).max(1) as f32;
        for row in rows.chunks_exact(stride.max(1)) {
            for (sum, x) in mean[..cols].chunks_mut(S::LANES).zip(row.chunks(S::LANES)) {
                let next = s.add(s.load_tail(sum), s.load(x));
                s.store_tail(sum, next);
            }
        }
        let mut squares = s.splat(0.0);
        for x in mean.chunks_exact_mut(S::LANES) {
            let y = s.div(s.load(x), s.splat(n));
            s.store(x, y);
            squares = s.mul_add(y, y, squares);
        }
        let length = s.reduce_add(squares).sqrt();
        if length != 0.0 {
            for x in mean.chunks_exact_mut(S::LANES) {
                let y = s.div(s.load(x), s.splat(length));
                s.store(x, y);
            }
        }
    }
}

/// A configuration for catalogues: norms, 3 heads of 8 and a feed-forward layer, of
/// numbers from -1 to 1.
pub(crate) fn showing(
    at: &dyn Fn(u64, usize, usize) -> f32,
    dim: usize,
    width: usize,
    gated: bool,
) -> (CrossAttention, FeedForward) {
    let root = |n: usize| 1.0 / (n.max(1) as f32).sqrt();
    let row = |which: u64, n: usize| Array1::from_shape_fn(n, |c| 0.3 * at(which, c, n));
    let of = |which: u64, out: usize, of: usize| {
        (Array2::from_shape_fn((out, of), |(a, b)| root(of) * at(which, a, b)), Some(row(which, out)))
    };
    let norm = |which: u64, n: usize| LayerNorm { gain: row(which, n) + 1.0, shift: row(which + 1, n) };
    let (inner, made) = (24, if gated { 48 } else { 24 });
    let cross = CrossAttention {
        heads: 3,
        norm: Some(norm(20, dim)),
        norm_read: Some(norm(22, width)),
        query: of(24, 24, dim),
        key: of(25, 24, width),
        value: of(26, 24, width),
        out: of(27, dim, 24),
    };
    (cross, FeedForward { norm: norm(28, dim), up: of(30, made, dim), down: of(31, dim, inner), gated })
}

/// What builders of mechanisms that read rows have in common.
macro_rules! reader_options {
    ($builder:ident) => {
        impl $builder {
            /// A feed-forward layer behind the attention. Default: none.
            pub fn feed_forward(self, forward: crate::stages::reading::FeedForward) -> Self {
                Self { forward: Some(forward), ..self }
            }

            /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
            pub fn scale(self, scale: f32) -> Self {
                Self { scale: Some(scale), ..self }
            }
        }
    };
}
pub(crate) use reader_options;

/// A mechanism that is a [`Reader`] of rows, to which embeddings of their places
/// may be added.
macro_rules! reads {
    ($mechanism:ident, |$this:ident| $reader:expr, $added:expr) => {
        impl<T: crate::element::Element> crate::stages::pass::Pipeline<crate::input::reading::Reading<'_, T>>
            for $mechanism
        {
            type State = ();

            fn flow(
                &self,
                x: crate::input::reading::Reading<'_, T>,
                _: Option<&mut ()>,
                pass: &mut crate::stages::pass::Pass<'_>,
                out: crate::stages::pass::Out<'_, T>,
            ) -> crate::error::Result<()> {
                let $this = self;
                $reader.read(pass, &x, $added, out)
            }

            fn define<R: crate::definition::number::Real>(
                &self,
                x: crate::input::reading::Reading<'_, T>,
                _: Option<&()>,
            ) -> crate::error::Result<crate::stages::pass::Defined<R, ()>> {
                let $this = self;
                Ok(($reader.define_reading(&x, $added)?, ()))
            }

            fn bound(
                &self,
                x: crate::input::reading::Reading<'_, T>,
            ) -> crate::error::Result<ndarray::Array3<f64>> {
                self.bound_by::<crate::definition::number::Likely>(x)
            }

            fn parameters(&self) -> usize {
                let $this = self;
                let added: Option<&ndarray::Array2<f32>> = $added;
                $reader.bytes() + added.map_or(0, |added| added.len() * size_of::<f32>())
            }
        }

        crate::stages::pass::composite!($mechanism, Reading);
    };
}
pub(crate) use reads;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::arrays::array;

    fn layer(seed: u64, out: usize, of: usize) -> Linear {
        let size = (3.0 / of.max(1) as f32).sqrt();
        (array(seed, (out, of)) * size, Some(array(seed + 50, out)))
    }

    fn norm(seed: u64, dim: usize) -> LayerNorm {
        LayerNorm { gain: array(seed, dim) + 1.5, shift: array(seed + 1, dim) }
    }

    /// Rows of `dim` elements that read rows of `width`.
    pub(crate) fn cross(dim: usize, width: usize, [heads, key, value]: [usize; 3]) -> CrossAttention {
        CrossAttention {
            heads,
            norm: Some(norm(1, dim)),
            norm_read: Some(norm(3, width)),
            query: layer(5, heads * key, dim),
            key: layer(6, heads * key, width),
            value: layer(7, heads * value, width),
            out: layer(8, dim, heads * value),
        }
    }

    pub(crate) fn forward(dim: usize, inner: usize, gated: bool) -> FeedForward {
        let made = if gated { 2 * inner } else { inner };
        FeedForward { norm: norm(11, dim), up: layer(13, made, dim), down: layer(14, dim, inner), gated }
    }
}
