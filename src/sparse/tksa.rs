//! DRSformer's top-k sparse attention (TKSA) between channels.

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis};

use crate::attention::{Attention, Margins, Selects, TopWeights, Weights};
use crate::card::{carded, exhibit};
use crate::definition;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::weights::top_of;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{Layout, Per, Run, TokenLists};
use crate::select::lists::lists_of_rows;
use crate::select::{Forced, Pick, Rule};
use crate::stages::channels::{Channels, RowOf, Similarities};
use crate::stages::choosing::{AtOnce, Choosing, choosing};
use crate::stages::mixture::{self, Mixture};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Out, Pass, once};
use crate::stages::{mix, selecting};

/// DRSformer's top-k sparse attention (TKSA) between channels.
///
/// ```text
/// S_ij = temperature_h  q_i . k_j / (|q_i| |k_j|)     for channels i, j; norms over the pixels, at least 1e-12
/// T_r  = the floor(r C) channels with the largest S_ij, the lower one of equals, at least one
/// o_i  = sum_r a_r sum_{j in T_r} softmax_{T_r}(S_i)_j v_j    for the ratios r = 1/2, 2/3, 3/4, 4/5
/// ```
///
/// Channels attend to channels, so that the cost is linear in the pixels; the
/// four choices are prefixes of one order, and one matrix of weights is applied.
/// From "Learning A Sparse Transformer Network for Effective Image Deraining"
/// (arXiv 2303.11950), with mixing weights `a_r` that are learned.
///
/// Rows are channels and columns pixels: `[batch, heads, channels, pixels]`.
///
/// Keys are channels, of which no more come: it runs over arrays.
///
/// Cost: `4 pixels` flops a pair of channels.
///
/// An index has a list for each ratio and channel: query `r * channels + i`.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::Tksa};
/// use ndarray::Array4;
///
/// // 48 channels in 3 heads, of 20 x 30 pixels.
/// let x = Array4::from_shape_fn((1, 3, 16, 600), |(_, h, i, p)| ((h + i * (p + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let tksa = Tksa::builder(vec![1.0; 3]).mix(vec![(0.5, 0.6), (0.75, 0.4)]).build()?;
/// let index = tksa.select(x)?;
/// assert_eq!([index.keys(0, 0, 0), index.keys(0, 0, 16)], [8, 12]);
/// let out = tksa.forward_on(x, &index)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tksa {
    temperatures: Vec<f32>,
    ratios: Vec<f64>,
    shares: Vec<f32>,
    channels: Channels,
}

/// The most ratios.
const MOST: usize = 16;

impl Tksa {
    /// With a temperature for each head, or one for all.
    pub fn builder(temperatures: Vec<f32>) -> TksaBuilder {
        TksaBuilder::with(temperatures)
    }

    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        x.lengths.check_full("channels", "rows are channels, and all images have as many")?;
        let count = self.temperatures.len();
        if count != 1 && count != dims.q_heads {
            return Err(Error::value("q", format!("{count} heads, as many as temperatures"), dims.q_heads));
        }
        Ok(dims)
    }

    /// The same of an index, too.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, index: &TokenLists) -> Result<Dims> {
        let dims = self.check(x)?;
        let want = self.layout(&dims);
        if *index.layout() != want {
            return Err(Error::value("keys", format!("{want:?}"), format_args!("{:?}", index.layout())));
        }
        Ok(dims)
    }

    fn temperature(&self, head: usize) -> f32 {
        self.temperatures[if self.temperatures.len() == 1 { 0 } else { head }]
    }

    fn layout(&self, dims: &Dims) -> Layout {
        Layout { queries: self.ratios.len() * dims.q_len, ..Layout::new(Per::Head, 1, dims) }
    }

    /// The channel whose list is that of a query, and what is chosen of its row.
    fn pick(&self, dims: &Dims, query: usize) -> (usize, Pick) {
        let kept = (dims.kv_len as f64 * self.ratios[query / dims.q_len]).floor() as usize;
        let rule = Rule::TopK(kept.max(1).min(dims.kv_len));
        (query % dims.q_len, Pick { rule, forced: Forced::default() })
    }

    fn similarities<'a, T: Element>(&self, pass: &mut Pass<'a>, x: &Qkv<'_, T>) -> Result<Similarities<'a>> {
        // Channels are columns there, and pixels are summed over.
        let [q, k] = [x.q.reborrow(), x.k.reborrow()].map(|x| x.permuted_axes([0, 1, 3, 2]));
        self.channels.similarities(pass, [q, k], x.q.dim().1, |head| self.temperature(head))
    }

    /// The same of a head, by definition.
    fn define_similarities<R: Real>(&self, [q, k]: [&Array2<R>; 2], head: usize) -> Array2<R> {
        let [q, k] = [q, k].map(|x| x.t().to_owned());
        self.channels.define_similarities([&q, &k], f64::from(self.temperature(head)))
    }

    /// The choice, from similarities.
    fn choice(&self, dims: &Dims, rows: ArrayView4<'_, f32>) -> Result<TokenLists> {
        lists_of_rows(self.channels.isa, self.layout(dims), rows, |query| self.pick(dims, query))
    }

    /// The lists of a channel, one for each ratio.
    fn named<'a>(&self, index: &'a TokenLists, [b, h, i]: [usize; 3], ratio: usize) -> &'a [Run] {
        let m = index.layout().queries / self.ratios.len();
        index.runs(b, h, ratio * m + i)
    }

    /// Weights and outputs, on an index or on one of its own.
    fn stages<T: Element>(
        &self,
        x: Qkv<'_, T>,
        index: Option<&TokenLists>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, isa) = (self.check(&x)?, self.channels.isa);
        let scores = self.similarities(pass, &x)?;
        let mut weights = pass.rows((dims.batch, dims.q_heads, dims.q_len, dims.kv_len))?;
        // A run that counts makes no choice.
        let chooses = index.is_none() && out.is_some();
        let own = chooses.then(|| self.choice(&dims, scores.view())).transpose()?;
        let index = index.or(own.as_ref());
        scores.map(pass, &mut weights, |row, scores, weights| {
            let at = [row / dims.q_len / dims.q_heads, row / dims.q_len % dims.q_heads, row % dims.q_len];
            let Some(index) = index else { return };
            let set = |ratio| self.named(index, at, ratio);
            isa.dispatch(Mixture { scores, weights, set, shares: &self.shares });
        });
        mix::run(pass, isa, weights.view(), x.v, out);
        Ok(())
    }

    /// All similarities by definition.
    fn define_scores<T: Element>(&self, x: &Qkv<'_, T>, dims: &Dims) -> Array4<f64> {
        of_heads(&Dims { value_dim: dims.kv_len, ..*dims }, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            self.define_similarities([&q, &k], head.head)
        })
    }

    /// Scores that no list has become -inf.
    fn hide<R: Copy>(&self, scores: &mut Array4<R>, index: &TokenLists, hidden: R) {
        let (batch, heads, rows, _) = scores.dim();
        let places = ndarray::indices((batch, heads, rows)).into_iter();
        for ((b, h, i), mut row) in places.zip(scores.rows_mut()) {
            let mut seen = vec![false; row.len()];
            (0..self.ratios.len())
                .flat_map(|r| self.named(index, [b, h, i], r))
                .for_each(|run| seen[run.range()].fill(true));
            row.iter_mut().zip(seen).filter(|(_, seen)| !seen).for_each(|(x, _)| *x = hidden);
        }
    }

    /// The definition on an index: weights of all channels, or outputs.
    fn define<R: Real, T: Element>(
        &self,
        x: &Qkv<'_, T>,
        index: &TokenLists,
        weights: bool,
    ) -> Result<Array4<R>> {
        let dims = self.fitting(x, index)?;
        let dims = if weights { Dims { value_dim: dims.kv_len, ..dims } } else { dims };
        Ok(of_heads(&dims, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            let v: Array2<R> = head.rows(&x.v, &head.keys);
            let scores: Array2<R> = self.define_similarities([&q, &k], head.head);
            let mut out = Array2::from_elem((dims.q_len, dims.value_dim), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let sets = (0..self.ratios.len()).map(|r| self.named(index, [head.batch, head.head, i], r));
                for (j, weight) in mixture::define(&scores.row(i).to_vec(), sets, &self.shares) {
                    if weights {
                        out[j] = out[j] + weight;
                        continue;
                    }
                    out.iter_mut().zip(v.row(j)).for_each(|(out, &v)| *out = *out + weight * v);
                }
            }
            out
        }))
    }
}

options! {
    /// Builds a [`Tksa`].
    TksaBuilder of Tksa, isa;
    given { temperatures: Vec<f32>, in FINITE; }
    set {
        /// Ratios of channels that are kept, each with the weight of its result. Default:
        /// 1/2, 2/3, 3/4 and 4/5, each with 0.2.
        mix: Vec<(f64, f32)> = [1.0 / 2.0, 2.0 / 3.0, 3.0 / 4.0, 4.0 / 5.0].map(|ratio| (ratio, 0.2)).into();
    }
    build(this, config) {
        if this.temperatures.is_empty() {
            return Err(Error::value("temperatures", "one for all heads or one for each", "none"));
        }
        let holds = |&&(ratio, share): &&(f64, f32)| !(ratio > 0.0 && ratio <= 1.0 && share.is_finite());
        if let Some((ratio, share)) = this.mix.iter().find(holds) {
            let expected = "ratios above 0 up to 1, and finite weights";
            return Err(Error::value("mix", expected, format_args!("({ratio}, {share})")));
        }
        if this.mix.is_empty() {
            return Err(Error::value("mix", "at least one ratio", "none"));
        }
        if this.mix.len() > MOST {
            return Err(Error::value("mix", format!("at most {MOST} ratios"), this.mix.len()));
        }
        let channels = Channels { isa: config.isa, row: RowOf::Softmax, unit: true };
        let (ratios, shares) = this.mix.into_iter().unzip();
        Ok(Tksa { temperatures: this.temperatures, ratios, shares, channels })
    }
}

impl<T: Element> Choosing<Qkv<'_, T>> for Tksa {
    type Index = TokenLists;

    fn choose(&self, x: Qkv<'_, T>, _: &mut Workspace) -> Result<TokenLists> {
        let dims = self.check(&x)?;
        let scores = once(|pass| Ok(self.similarities(pass, &x)?.view().to_owned()))?;
        self.choice(&dims, scores.view())
    }

    fn define_choice(&self, x: Qkv<'_, T>) -> Result<(TokenLists, Margins)> {
        let dims = self.check(&x)?;
        let scores = self.define_scores(&x, &dims);
        definition::select::lists_of_rows(self.layout(&dims), &scores, |query| self.pick(&dims, query))
    }

    fn differ(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
        selecting::difference(a, b, margins)
    }

    fn flow_on(&self, x: Qkv<'_, T>, index: &TokenLists, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.fitting(&x, index)?;
        self.stages(x, Some(index), pass, out)
    }

    fn define_on<R: Real>(&self, x: Qkv<'_, T>, index: &TokenLists) -> Result<Array4<R>> {
        self.define(&x, index, false)
    }
}

impl<T: Element> AtOnce<Qkv<'_, T>> for Tksa {
    fn flow(&self, x: Qkv<'_, T>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.stages(x, None, pass, out)
    }
}
choosing!(Tksa, TokenLists, Qkv, at once);

impl<T: Element> Weights<Qkv<'_, T>> for Tksa {
    fn scores(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        let index = self.select(x)?;
        let mut scores = once(|pass| Ok(self.similarities(pass, &x)?.view().to_owned()))?;
        self.hide(&mut scores, &index, f32::NEG_INFINITY);
        Ok(scores)
    }

    fn weights(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        let (batch, heads, n, _) = x.v.dim();
        let one = |(_, _, j, c): (usize, usize, usize, usize)| f32::from(j == c);
        let v = Array4::from_shape_fn((batch, heads, n, n), one);
        let (q, k) = (x.q.mapv(Element::to_f32), x.k.mapv(Element::to_f32));
        self.forward(Qkv::new(q.view(), k.view(), v.view()))
    }

    fn key_weights(&self, x: Qkv<'_, T>) -> Result<Array3<f32>> {
        Ok(self.weights(x)?.sum_axis(Axis(2)))
    }

    fn top_weights(&self, x: Qkv<'_, T>, count: usize) -> Result<TopWeights> {
        top_of(&self.weights(x)?, count)
    }

    fn reference_scores(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let (index, _) = self.reference_select(x)?;
        let mut scores = self.define_scores(&x, &self.check(&x)?);
        self.hide(&mut scores, &index, f64::NEG_INFINITY);
        Ok(scores)
    }

    fn reference_weights(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let (index, _) = self.reference_select(x)?;
        self.define(&x, &index, true)
    }
}

exhibit! {
    TksaExhibit of Tksa, "sparse", "TKSA", "arXiv 2303.11950";
    "rows are channels, and each is a mixture of its most similar half, two thirds, three and four fifths";
    not "where pixels must attend to pixels";
    tokens false;
    build(_, _) { Tksa::builder(vec![3.0]) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Tksa, TksaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::testing::{Arrays, near};

    fn tksa(mix: &[(f64, f32)]) -> Tksa {
        Tksa::builder(vec![2.0, 0.5, -1.0, 9.0]).mix(mix.to_vec()).build().unwrap()
    }

    /// Four masked softmaxes and four products, one after the other, and by size
    /// of the ratios in any order.
    #[test]
    fn one_matrix_is_four_softmaxes() {
        for (m, n, pixels) in [(12, 12, 300), (48, 48, 4500), (5, 1, 9), (3, 33, 64)] {
            let x = Arrays::normal([2, 4, 2, m, n, pixels, 40], n as u64);
            let four = [(0.5, 0.2), (2.0 / 3.0, 0.3), (0.75, -0.1), (0.8, 0.4)];
            let all = tksa(&four).forward(x.qkv()).unwrap();
            let mut sum = Array4::zeros(all.dim());
            for one in four.into_iter().rev() {
                sum += &tksa(&[one]).forward(x.qkv()).unwrap();
            }
            near(&format!("{m} {n}"), &all, &sum);
        }
    }

    #[test]
    fn all_channels_are_a_softmax_and_sizes_do_not_count() {
        let mut x = Arrays::normal([1, 2, 2, 9, 9, 50, 20], 3);
        let tksa = Tksa::builder(vec![4.0]).mix(vec![(1.0, 0.5), (1.0, 0.25)]).build().unwrap();
        let weights = tksa.weights(x.qkv()).unwrap();
        let unit = |x: &Array4<f32>| crate::testing::unit(x.clone());
        let (q, k) = (unit(&x.q), unit(&x.k));
        for ((b, h, i, j), &got) in weights.indexed_iter() {
            let exp =
                |j: usize| (4.0 * (0..50).map(|c| q[[b, h, i, c]] * k[[b, h, j, c]]).sum::<f32>()).exp();
            let want = 0.75 * exp(j) / (0..9).map(exp).sum::<f32>();
            assert!((got - want).abs() < 1e-5, "{got}, {want}");
        }
        let before = tksa.forward(x.qkv()).unwrap();
        x.q.index_axis_mut(Axis(2), 4).mapv_inplace(|x| 7.5 * x);
        x.k.index_axis_mut(Axis(2), 2).mapv_inplace(|x| 0.3 * x);
        near("sizes", &tksa.forward(x.qkv()).unwrap(), &before);
        let top = tksa.top_weights(x.qkv(), 2).unwrap();
        assert!(top.weights.rows().into_iter().all(|row| row[0] >= row[1] && row[1] > 0.0));
    }

    /// Of equal weights those of the lower channels come first.
    #[test]
    fn equal_weights_are_in_order() {
        let x = Arrays::normal([1, 2, 2, 9, 9, 50, 20], 3);
        let tksa = Tksa::builder(vec![0.0]).mix(vec![(1.0, 1.0)]).build().unwrap();
        let top = tksa.top_weights(x.qkv(), 4).unwrap();
        assert!(top.keys.rows().into_iter().all(|row| row.to_vec() == [0, 1, 2, 3]), "{}", top.keys);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: TksaBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Tksa::builder(vec![])).starts_with("temperatures: "));
        for mix in [vec![], vec![(0.0, 1.0)], vec![(1.5, 1.0)], vec![(0.5, f32::NAN)]] {
            assert!(refusal(Tksa::builder(vec![1.0]).mix(mix)).starts_with("mix: "));
        }
        let x = Arrays::normal([1, 4, 1, 4, 4, 5, 5], 1);
        let other = tksa(&[(0.5, 1.0), (0.8, 1.0)]).select(x.qkv()).unwrap();
        let refusal = tksa(&[(0.5, 1.0)]).forward_on(x.qkv(), &other).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
    }
}
