//! NSA: native sparse attention, a gated sum of three branches.

use ndarray::{Array2, Array3, Array4, ArrayView4, ArrayViewMut4, Axis, arr0, s};

use crate::attention::{Attention, Cost, Dim4, ERROR_CONSTANT, Input, Margins, Selects};
use crate::card::{Extras, carded, exhibit};
use crate::definition;
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::{Workspace, take_array};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::{ATOM, BlockLists, Keys, Per};
use crate::mask::{WholePools, Window};
use crate::score::Plain;
use crate::select::{
    Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Selected, Source, Summary, select,
    workspace_bytes,
};
use crate::simd::mem::{Heads, bytes_for};
use crate::stages::attend::{Config, Options, check_out};
use crate::stages::gated_sum::GatedSum;
use crate::stages::listed::Order;
use crate::stages::means::Means;
use crate::stages::selecting::{difference, sparse_options};

/// Queries, keys and values, the gates of the branches, and what branches have
/// of their own.
#[derive(Clone, Copy, Debug)]
pub struct Branches<'a, T> {
    /// What the selected blocks are of.
    pub qkv: Qkv<'a, T>,
    /// `[batch, q_heads, q_len, 3]`: of pools, blocks and window.
    pub gates: ArrayView4<'a, f32>,
    /// Compressed keys and values, `[batch, kv_heads, pools, dim]`, one for each
    /// pool that is whole.
    pub compressed: Option<[ArrayView4<'a, T>; 2]>,
    /// Keys and values of the window, of the shapes of the others.
    pub window: Option<[ArrayView4<'a, T>; 2]>,
}

impl<'a, T> Branches<'a, T> {
    /// With means as pools, and the same keys and values for all.
    pub fn new(qkv: Qkv<'a, T>, gates: ArrayView4<'a, f32>) -> Self {
        Self { qkv, gates, compressed: None, window: None }
    }

    /// With compressed keys and values.
    pub fn compressed(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { compressed: Some([k, v]), ..self }
    }

    /// With keys and values of the window.
    pub fn window(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { window: Some([k, v]), ..self }
    }
}

impl<T: Element> Input for Branches<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        let Dims { batch, q_heads, kv_heads, q_len, head_dim, value_dim, .. } = dims;
        if dims.packed {
            return Err(Error::packed("NSA"));
        }
        if self.gates.dim() != (batch, q_heads, q_len, 3) {
            let expected = format!("[batch, q_heads, q_len, 3] = [{batch}, {q_heads}, {q_len}, 3]");
            return Err(Error::shape("gates", expected, self.gates.shape()));
        }
        if let Some([k, v]) = &self.compressed {
            let n = k.dim().2;
            for (name, x, dim) in [("compressed k", k, head_dim), ("compressed v", v, value_dim)] {
                if x.dim() != (batch, kv_heads, n, dim) {
                    let expected =
                        format!("[batch, kv_heads, pools, dim] = [{batch}, {kv_heads}, {n}, {dim}]");
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        if let Some([k, v]) = &self.window {
            for (name, x, want) in [("window k", k, &self.qkv.k), ("window v", v, &self.qkv.v)] {
                if x.dim() != want.dim() {
                    let expected = format!("that of the other branches, {:?}", want.shape());
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.qkv)
    }
}

/// NSA: native sparse attention, a gated sum of three branches.
///
/// ```text
/// p_c  = softmax_c (scale q . k~_c)       pools c of 32 keys, every 16, seen whole
/// I_b  = sum over the heads of a group and the pools c of p_c times the strides
///        that pool c and block b of 64 keys share
/// S    = the first block, the query's own and the one before it, and those with
///        the largest I_b, 16 together
/// o    = g_1 sum_c p_c v~_c + g_2 attention on S + g_3 attention on a window
/// ```
///
/// each a softmax of its own, of keys up to the query's position. From "Native
/// Sparse Attention" (arXiv 2502.11089). Gates are the model's; so are compressed
/// keys and values where it has learned to make them
/// ([`compressed`](Branches::compressed)), which otherwise are means, and the
/// keys and values of the window if it has its own.
///
/// Cost: `2 head_dim / stride` flops a visible pair for the selection and `2
/// (head_dim + value_dim) / stride` for the pools; `2 (head_dim + value_dim)` a
/// pair of a selected block or of the window.
///
/// ```
/// use attention_kernels::sparse::{Branches, Nsa};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let gates = Array4::from_elem((1, 2, 700, 3), 0.5);
/// let nsa = Nsa::builder(4).window(100).build()?;
/// let out = nsa.forward(Branches::new(Qkv::new(x.view(), x.view(), x.view()), gates.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Nsa {
    config: Config<Order, Plain>,
    builder: NsaBuilder,
}

/// Builds an [`Nsa`].
#[derive(Clone, Debug)]
pub struct NsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    pool: [usize; 2],
    block: usize,
    first: usize,
    local: usize,
    window: usize,
}

impl Nsa {
    /// `k` blocks a query, those that are always read among them (16 in the
    /// paper); causal.
    pub fn builder(k: usize) -> NsaBuilder {
        let options = Options::default();
        NsaBuilder { options, k, pool: [32, 16], block: 64, first: 1, local: 2, window: 512 }.causal()
    }
}

sparse_options!(NsaBuilder);

impl NsaBuilder {
    /// Keys of a pool and from one to the next, of which the former are a
    /// multiple. Default: 32 and 16.
    pub fn pool(self, width: usize, stride: usize) -> Self {
        Self { pool: [width, stride], ..self }
    }

    /// Keys of a block: a multiple of 64, and of those from one pool to the
    /// next. Default: 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// The first so many blocks are always read. Default: 1.
    pub fn first(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// So are the query's own and those before it, so many together. Default: 2.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Keys of the window, the query's own among them. Default: 512.
    pub fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` or a window of 0, pools and blocks that are no
    /// multiples as they should be, and a scale that is not finite;
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Nsa> {
        let [width, stride] = self.pool;
        for (name, n) in [("k", self.k), ("window", self.window)] {
            if n == 0 {
                return Err(Error::value(name, "at least 1", 0));
            }
        }
        if stride == 0 || width == 0 || !width.is_multiple_of(stride) {
            let expected = "a multiple of the keys from one to the next, at least 1";
            return Err(Error::value("pool", expected, format_args!("{width} every {stride}")));
        }
        if self.block == 0 || !self.block.is_multiple_of(ATOM) || !self.block.is_multiple_of(stride) {
            return Err(Error::value(
                "block",
                format!("a multiple of {ATOM} and of {stride} keys"),
                self.block,
            ));
        }
        Ok(Nsa { config: self.options.clone().build()?, builder: self })
    }
}

/// Where pools are: given, or made.
enum Made<'a> {
    No,
    Yes([ArrayView4<'a, f32>; 2]),
}

impl Nsa {
    fn scheme(&self, dims: &Dims) -> Scheme {
        let NsaBuilder { k, pool: [width, stride], block, first, local, .. } = self.builder;
        Scheme {
            unit: block,
            summary: Summary::Mean,
            per: Per::Group,
            q_block: 1,
            shares: Some(self.config.scale(dims) as f32),
            reduce: Reduce::Sum,
            pick: Pick { rule: Rule::TopK(k), forced: Forced { first, last: local, inside: true } },
            causal: true,
            scored: Scored::Pools(Pools { width, stride, fold: Fold::Sum, coarse: None, dense: 0 }),
        }
    }

    fn means(&self) -> Means {
        let [width, stride] = self.builder.pool;
        Means { isa: self.config.isa(), width, stride }
    }

    /// The sizes of a call that fits, and keys of each sequence.
    fn dims<T: Element>(&self, x: &Branches<'_, T>) -> Result<(Dims, Vec<usize>)> {
        let dims = Input::dims(x)?;
        let tokens: Vec<usize> =
            (0..dims.batch).map(|i| x.qkv.lengths.sequence(&dims, i).keys.len()).collect();
        if let Some([k, _]) = &x.compressed {
            let want = self.means().count(tokens.iter().copied().max().unwrap_or(0));
            if k.dim().2 < want {
                return Err(Error::value("compressed k", format!("{want} pools or more"), k.dim().2));
            }
        }
        Ok((dims, tokens))
    }

    fn with_source<T: Element, R>(
        &self,
        x: &Branches<'_, T>,
        run: impl FnOnce(&Source<'_>, &Scheme) -> Result<R>,
    ) -> Result<R> {
        let (dims, _) = self.dims(x)?;
        let source = Source::new(self.config.isa(), x.qkv.reborrow(), None)?;
        match x.compressed {
            Some([k, _]) => run(&source.over(T::any(Heads::new(k))), &self.scheme(&dims)),
            None => run(&source, &self.scheme(&dims)),
        }
    }

    /// Calls `run` with the calls of the branches.
    fn with_calls<T: Element, R>(
        &self,
        x: &Branches<'_, T>,
        index: &BlockLists,
        made: Made<'_>,
        run: impl FnOnce([Call<'_>; 3]) -> R,
    ) -> Result<R> {
        const NORM: Norm<'static> = Norm::Softmax { sinks: None };
        let (dims, tokens) = self.dims(x)?;
        let [width, stride] = self.builder.pool;
        let counts: Vec<usize> = tokens.iter().map(|&n| self.means().count(n)).collect();
        let pools = self.config.masked(WholePools { width, stride, tokens });
        let window = self.config.masked(Window::new(Some(self.builder.window - 1), Some(0)));
        let plan = Keys::Blocks(index);
        plan.check(&dims, &x.qkv.lengths)?;
        let qkv = x.qkv.reborrow();
        let lengths = match qkv.lengths {
            Lengths::Full if x.compressed.is_none() => Lengths::Full,
            _ => Lengths::Keys(&counts),
        };
        let first = match (made, x.compressed) {
            (Made::Yes([k, v]), _) => {
                pools.call(Qkv { lengths, ..Qkv::new(qkv.q, k.reborrow(), v.reborrow()) }, NORM, None)?
            }
            (Made::No, Some([k, v])) => {
                pools.call(Qkv { lengths, ..Qkv::new(qkv.q, k.reborrow(), v.reborrow()) }, NORM, None)?
            }
            (Made::No, None) => return Err(Error::value("compressed", "pools", "none")),
        };
        let second = Call { keys: plan, ..self.config.call(qkv, NORM, None)? };
        let [k, v] = x.window.map_or([qkv.k, qkv.v], |[k, v]| [k.reborrow(), v.reborrow()]);
        let third = window.call(Qkv { k, v, ..qkv }, NORM, None)?;
        Ok(run([first, second, third]))
    }

    /// The shapes of pools that are made, and of a branch's output.
    fn shapes<T: Element>(&self, x: &Branches<'_, T>, dims: &Dims) -> [Dim4; 3] {
        let pools = if x.compressed.is_some() { 0 } else { self.means().count(dims.kv_len) };
        let made = |dim| (dims.batch, dims.kv_heads, pools, dim);
        [made(dims.head_dim), made(dims.value_dim), (dims.batch, dims.q_heads, dims.q_len, dims.value_dim)]
    }

    fn bytes<T: Element>(&self, x: &Branches<'_, T>, index: &BlockLists) -> Result<usize> {
        let (dims, _) = self.dims(x)?;
        let shapes = self.shapes(x, &dims);
        let zero = arr0(0f32);
        let views = [shapes[0], shapes[1]].map(|shape| zero.broadcast(shape));
        let made = match (views, x.compressed) {
            ([Some(k), Some(v)], None) => Made::Yes([k, v]),
            _ => Made::No,
        };
        let engines = |calls: [Call<'_>; 3]| calls.iter().map(engine::workspace_bytes).max().unwrap_or(0);
        let engines = self.with_calls(x, index, made, engines)?;
        let held = |(b, h, n, d): Dim4| bytes_for::<f32>(b * h * n * d);
        let rows = |dim| (dims.batch, dims.kv_heads, dims.kv_len, dim);
        let means = [dims.head_dim, dims.value_dim].map(|dim| self.means().bytes(rows(dim)));
        let sum = GatedSum { isa: self.config.isa(), dim: shapes[2] }.bytes();
        let scratch = engines.max(means[0]).max(means[1]).max(sum);
        Ok(held(shapes[0]) + held(shapes[1]) + 3 * held(shapes[2]) + scratch)
    }

    /// The definition on an index: the output, and how far the kernel may be off.
    fn define<T: Element>(
        &self,
        x: &Branches<'_, T>,
        index: &BlockLists,
    ) -> Result<(Array4<f64>, Array3<f64>)> {
        let (dims, tokens) = self.dims(x)?;
        Keys::Blocks(index).check(&dims, &x.qkv.lengths)?;
        let Dims { batch, q_heads, kv_heads, q_len, value_dim, .. } = dims;
        let (scale, [width, stride]) = (self.config.scale(&dims), self.builder.pool);
        let mut out = Array4::zeros((batch, q_heads, q_len, value_dim));
        let mut bound = Array3::zeros((batch, q_heads, q_len));
        for (b, h) in (0..batch).flat_map(|b| (0..q_heads).map(move |h| (b, h))) {
            let (n, g) = (tokens[b], h / (q_heads / kv_heads));
            let wide = |x: &ArrayView4<'_, T>| x.slice(s![b, g, .., ..]).mapv(Element::to_f64);
            let means = |x: Array2<f64>| {
                let ends = (0..).map(|w| w * stride + width).take_while(|&end| end <= n);
                let rows: Vec<_> =
                    ends.map(|end| x.slice(s![end - width..end, ..]).mean_axis(Axis(0)).unwrap()).collect();
                Array2::from_shape_fn((rows.len(), x.ncols()), |(w, c)| rows[w][c])
            };
            let own = [wide(&x.qkv.k), wide(&x.qkv.v)];
            let of_pools =
                x.compressed.as_ref().map_or_else(|| own.clone().map(means), |[k, v]| [wide(k), wide(v)]);
            let of_window = x.window.as_ref().map_or_else(|| own.clone(), |[k, v]| [wide(k), wide(v)]);
            let site = x.qkv.lengths.sequence(&dims, b).site(h);
            for i in 0..q_len {
                let q = x.qkv.q.slice(s![b, h, i, ..]).mapv(Element::to_f64);
                let seen = (i + n + 1).saturating_sub(q_len).min(n);
                let pools = (0..of_pools[0].nrows()).filter(|w| w * stride + width <= seen).collect();
                let chosen = (0..seen).filter(|&j| index.visible(&site, i, j)).collect();
                let near = (0..seen).filter(|&j| j + self.builder.window >= seen).collect();
                let branches: [(&[Array2<f64>; 2], Vec<usize>); 3] =
                    [(&of_pools, pools), (&own, chosen), (&of_window, near)];
                for (part, ([k, v], keys)) in branches.into_iter().enumerate() {
                    let gate = f64::from(x.gates[[b, h, i, part]]);
                    let score = |&j: &usize| scale * q.dot(&k.row(j));
                    // A score of -inf hides its key.
                    let keys: Vec<_> = keys.into_iter().filter(|j| score(j) != f64::NEG_INFINITY).collect();
                    let most = keys.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = keys.iter().map(|j| (score(j) - most).exp()).sum();
                    let (mut size, mut largest) = (0f64, 0f64);
                    for j in &keys {
                        let mut row = out.slice_mut(s![b, h, i, ..]);
                        row.scaled_add(gate * (score(j) - most).exp() / sum, &v.row(*j));
                        if most - score(j) < 25.0 {
                            let products = q.iter().zip(k.row(*j)).map(|(q, k)| (q * k).abs()).sum::<f64>();
                            size = size.max(scale.abs() * products + score(j).abs());
                        }
                        largest = v.row(*j).iter().fold(largest, |most, v| most.max(v.abs()));
                    }
                    // Sums of a pool are rounded too, and so are those of branches.
                    let terms = (dims.head_dim + keys.len() + 4 + if part == 0 { width } else { 0 }) as f64;
                    let own = ERROR_CONSTANT * 2f64.powi(-24) * (terms + size) * largest;
                    bound[[b, h, i]] += gate.abs() * own;
                }
            }
        }
        Ok((out, bound))
    }
}

impl<T: Element> Attention<Branches<'_, T>> for Nsa {
    /// Selects first: scratch of the attention depends on what is selected.
    fn workspace_bytes(&self, x: Branches<'_, T>) -> Result<usize> {
        let bytes = self.with_source(&x, workspace_bytes)?;
        Ok(bytes.max(self.bytes(&x, &self.select(x)?)?))
    }

    fn forward_into(
        &self,
        x: Branches<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        check_out(&x, &out)?;
        let index = self.with_source(&x, |source, scheme| select(source, scheme, workspace)?.blocks())?;
        self.forward_on_into(x, &index, out, workspace)
    }

    fn reference(&self, x: Branches<'_, T>) -> Result<Array4<f64>> {
        self.reference_on(x, &self.reference_select(x)?.0)
    }

    fn cost(&self, x: Branches<'_, T>) -> Result<Cost> {
        let (dims, tokens) = self.dims(&x)?;
        let index = self.select(x)?;
        let blocks = self.config.listed(Keys::Blocks(&index)).cost(&x.qkv)?;
        let window = self.config.masked(Window::new(Some(self.builder.window - 1), Some(0))).cost(&x.qkv)?;
        let seen = |n: usize| {
            (0..dims.q_len).map(move |i| self.means().count((i + n + 1).saturating_sub(dims.q_len)))
        };
        let pools: usize = tokens.iter().map(|&n| seen(n).sum::<usize>()).sum();
        let pools = 2 * pools * dims.q_heads * (2 * dims.head_dim + dims.value_dim);
        Ok(Cost { flops: blocks.flops + window.flops + pools as u64, ..blocks })
    }
}

impl<T: Element> Selects<Branches<'_, T>> for Nsa {
    type Index = BlockLists;

    fn select(&self, x: Branches<'_, T>) -> Result<BlockLists> {
        self.with_source(&x, |source, scheme| select(source, scheme, &mut Workspace::new())?.blocks())
    }

    fn workspace_bytes_on(&self, x: Branches<'_, T>, index: &BlockLists) -> Result<usize> {
        self.bytes(&x, index)
    }

    fn forward_on_into(
        &self,
        x: Branches<'_, T>,
        index: &BlockLists,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        check_out(&x, &out)?;
        let (dims, _) = self.dims(&x)?;
        let shapes = self.shapes(&x, &dims);
        let mut arena = workspace.arena(self.bytes(&x, index)?)?;
        let [mut k, mut v] = [shapes[0], shapes[1]].map(|shape| take_array(&mut arena, shape));
        let mut parts = [shapes[2]; 3].map(|shape| take_array(&mut arena, shape));
        let mut made = Made::No;
        if x.compressed.is_none() {
            self.means().run(x.qkv.k, k.view_mut(), arena.reborrow());
            self.means().run(x.qkv.v, v.view_mut(), arena.reborrow());
            made = Made::Yes([k.view(), v.view()]);
        }
        self.with_calls(&x, index, made, |calls| {
            for (call, part) in calls.iter().zip(&mut parts) {
                engine::run_in(call, part.view_mut(), None, arena.reborrow());
            }
        })?;
        let sum = GatedSum { isa: self.config.isa(), dim: shapes[2] };
        sum.run(&parts.each_ref().map(|part| part.view()), x.gates, out, arena);
        Ok(())
    }

    fn reference_select(&self, x: Branches<'_, T>) -> Result<(BlockLists, Margins)> {
        let (dims, _) = self.dims(&x)?;
        let (scheme, lengths) = (self.scheme(&dims), &x.qkv.lengths);
        let layout = scheme.layout(&dims, lengths);
        layout.lists()?;
        let group = dims.q_heads / dims.kv_heads.max(1);
        let score = |b: usize, h: usize, i: usize, keys: std::ops::Range<usize>| {
            let q = x.qkv.q.slice(s![b, h, i, ..]);
            let channel = |c: usize| match &x.compressed {
                Some([k, _]) => k[[b, h / group, keys.start / scheme.cell(), c]].to_f64(),
                None => {
                    keys.clone().map(|j| x.qkv.k[[b, h / group, j, c]].to_f64()).sum::<f64>()
                        / keys.len() as f64
                }
            };
            q.iter().enumerate().map(|(c, q)| q.to_f64() * channel(c)).sum()
        };
        let (lists, margins) = definition::select::select(&scheme, &dims, lengths, &layout, score);
        Ok((Selected::of(&scheme, &dims, lengths, &lists).blocks()?, margins))
    }

    fn reference_on(&self, x: Branches<'_, T>, index: &BlockLists) -> Result<Array4<f64>> {
        Ok(self.define(&x, index)?.0)
    }

    fn bound_on(&self, x: Branches<'_, T>, index: &BlockLists) -> Result<Array3<f64>> {
        Ok(self.define(&x, index)?.1)
    }

    fn difference(a: &BlockLists, b: &BlockLists, margins: &Margins) -> Option<String> {
        difference(a, b, margins)
    }
}

exhibit! {
    NsaExhibit of Nsa, "sparse", "NSA", "arXiv 2502.11089";
    "means of 16 keys, 3 blocks of 64 keys by the weights of those, and a window of 24 keys, gated";
    not "where the model was not trained with it, and below some thousand keys";
    tokens false;
    build(_, _) { Nsa::builder(3).pool(16, 8).local(1).window(24) }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        let gate = |(_, h, i, part)| 0.5 + 0.4 * field.at(1, h, i, part);
        Extras { rates: Array4::from_shape_fn((batch, heads, len, 3), gate), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Branches<'a, T> { Branches::new(x, extras.rates.view()) }
}
carded!(Nsa, NsaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::sparse::testing::{Arrays, near};

    fn gates(x: &Arrays, of: [f32; 3]) -> Array4<f32> {
        let (batch, heads, len, _) = x.q.dim();
        Array4::from_shape_fn((batch, heads, len, 3), |(.., part)| of[part])
    }

    /// Each branch alone is dense attention if it sees all.
    #[test]
    fn branches_that_see_all_are_dense() {
        for sizes in [[2, 4, 2, 200, 200, 24, 12], [1, 4, 2, 3, 300, 24, 12]] {
            let x = Arrays::normal(sizes, 1);
            let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
            let alone = [
                (Nsa::builder(1).pool(1, 1), [1.0, 0.0, 0.0]),
                (Nsa::builder(100), [0.0, 1.0, 0.0]),
                (Nsa::builder(1).window(1000), [0.0, 0.0, 1.0]),
            ];
            for (builder, of) in alone {
                let gates = gates(&x, of);
                let out = builder.build().unwrap().forward(Branches::new(x.qkv(), gates.view())).unwrap();
                near("alone", &out, &want);
            }
        }
    }

    /// Given pools and windows are used: those of other arrays, and means as
    /// the mechanism makes them.
    #[test]
    fn given_arrays_are_those_that_are_read() {
        let (x, y) = (
            Arrays::integers([2, 4, 2, 150, 200, 24, 12], 1),
            Arrays::integers([2, 4, 2, 1, 200, 24, 12], 9),
        );
        let nsa = Nsa::builder(3).pool(16, 8).local(1).window(24).build().unwrap();
        let means = |x: &Array4<f32>| {
            let (b, h, n, d) = x.dim();
            let mut out = Array4::zeros((b, h, nsa.means().count(n), d));
            let mut workspace = Workspace::new();
            nsa.means().run(x.view(), out.view_mut(), workspace.arena(nsa.means().bytes(x.dim())).unwrap());
            out
        };
        let (k, v, gates) = (means(&x.k), means(&x.v), gates(&x, [0.5, 1.0, 0.25]));
        let own = Branches::new(x.qkv(), gates.view());
        let given = own.compressed(k.view(), v.view());
        assert_eq!(nsa.select(own).unwrap(), nsa.select(given).unwrap());
        near("given", &nsa.forward(given).unwrap(), &nsa.forward(own).unwrap());
        let (k, v) = (means(&y.k), means(&y.v));
        let other = own.compressed(k.view(), v.view()).window(y.k.view(), y.v.view());
        let index = nsa.select(other).unwrap();
        assert_ne!(index, nsa.select(own).unwrap());
        assert_eq!(index, nsa.reference_select(other).unwrap().0);
        let want = nsa.reference_on(other, &index).unwrap().mapv(|x| x as f32);
        near("other", &nsa.forward(other).unwrap(), &want);
    }

    #[test]
    fn later_tokens_and_other_queries_change_nothing() {
        let mut x = Arrays::integers([2, 4, 2, 200, 200, 24, 12], 4);
        let nsa = Nsa::builder(2).local(1).window(20).build().unwrap();
        let gates = gates(&x, [0.5, 1.0, 0.25]);
        let whole = nsa.forward(Branches::new(x.qkv(), gates.view())).unwrap();
        let cut = |n: usize, rows: std::ops::Range<usize>| {
            let (k, v) = (x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
            let qkv = Qkv::new(x.q.slice(s![.., .., rows.clone(), ..]), k, v);
            nsa.forward(Branches::new(qkv, gates.slice(s![.., .., rows, ..]))).unwrap()
        };
        for (n, rows) in [(200, 199..200), (150, 0..150), (200, 77..200), (20, 13..20)] {
            near("part", &cut(n, rows.clone()), &whole.slice(s![.., .., rows, ..]).to_owned());
        }
        let lengths = [150, 31];
        let first = x.q.slice(s![.., .., ..30, ..]);
        let qkv = Qkv::new(first, x.k.view(), x.v.view()).key_lengths(&lengths);
        let out = nsa.forward(Branches::new(qkv, gates.slice(s![.., .., ..30, ..]))).unwrap();
        x.k.slice_mut(s![0, .., 150.., ..]).fill(f32::NAN);
        x.k.slice_mut(s![1, .., 31.., ..]).fill(f32::NAN);
        let first = x.q.slice(s![.., .., ..30, ..]);
        let qkv = Qkv::new(first, x.k.view(), x.v.view()).key_lengths(&lengths);
        let branches = Branches::new(qkv, gates.slice(s![.., .., ..30, ..]));
        assert_eq!(nsa.forward(branches).unwrap(), out);
        near("lengths", &out, &nsa.reference(branches).unwrap().mapv(|x| x as f32));
    }

    /// With pools that are blocks, the importance of all blocks is the number of
    /// heads, and the one with the most weight is read.
    #[test]
    fn before_the_first_pool_there_is_none() {
        let x = Arrays::normal([1, 4, 2, 100, 100, 24, 12], 4);
        let gates = gates(&x, [1.0, 0.0, 0.0]);
        let out = Nsa::builder(2).build().unwrap().forward(Branches::new(x.qkv(), gates.view())).unwrap();
        assert!(out.slice(s![.., .., ..31, ..]).iter().all(|&x| x == 0.0));
        assert!(out.slice(s![.., .., 31, ..]).iter().all(|&x| x != 0.0));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: NsaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Nsa::builder(0)), "k: expected at least 1, got 0");
        assert_eq!(refusal(Nsa::builder(2).window(0)), "window: expected at least 1, got 0");
        assert!(refusal(Nsa::builder(2).pool(30, 16)).starts_with("pool: "));
        assert!(refusal(Nsa::builder(2).block(96)).starts_with("block: "));
        let x = Arrays::normal([1, 4, 2, 100, 100, 24, 12], 4);
        let nsa = Nsa::builder(2).build().unwrap();
        let refusal = |x: Branches<'_, f32>| nsa.forward(x).unwrap_err().to_string();
        let gates = gates(&x, [1.0; 3]);
        assert!(refusal(Branches::new(x.qkv(), gates.slice(s![.., .., .., ..2]))).starts_with("gates: "));
        let own = Branches::new(x.qkv(), gates.view());
        let few = own.compressed(x.k.slice(s![.., .., ..4, ..]), x.v.slice(s![.., .., ..4, ..]));
        assert_eq!(refusal(few), "compressed k: expected 5 pools or more, got 4");
        assert!(refusal(own.compressed(x.k.view(), x.k.view())).starts_with("compressed v: "));
        assert!(refusal(own.window(x.v.view(), x.v.view())).starts_with("window k: "));
    }
}
