//! CCA: core context aware attention.

use std::ops::Range;

use ndarray::{Array2, Array4, Axis, concatenate, s};

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::Sight;
use crate::error::{Error, Result};
use crate::input::tokens::Tokens;
use crate::input::{Dim4, Dims, Input, Lengths, Qkv, Site, filled};
use crate::mask::interval::{bits_of, coverage_of};
use crate::mask::{Coverage, Mask};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{self, Defined, Out, Pass, Pipeline, Scratch, composite};
use crate::stages::virtuals::{self, Merging};

/// What is seen as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    group: usize,
    near: usize,
}

impl Near {
    /// Tokens before a position that are seen as cores.
    fn far(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.near) / self.group * self.group
    }

    /// Which positions see cores: number `m` from `near + (m + 1) group - 1` on.
    fn sight(&self) -> Sight<'static> {
        Sight::Every { first: (self.near + self.group - 1) as isize, step: self.group }
    }

    /// The keys that a query sees.
    #[inline(always)]
    fn seen(&self, site: &Site, query: usize) -> Range<usize> {
        let position = (query + site.kv_len).checked_sub(site.q_len);
        position.map_or(0..0, |position| self.far(position)..position + 1)
    }
}

impl Mask for Near {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.seen(site, query).contains(&key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        self.seen(site, queries.start).start..self.seen(site, queries.end - 1).end
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let ends = [queries.start, queries.end - 1].map(|query| self.seen(site, query));
        coverage_of(&ends, &keys)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        bits_of(&self.seen(site, query), first)
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// Groups of tokens merged, `[batch, q_heads, groups, dim]` keys and values, kept
/// while decoding.
#[derive(Clone, Debug, PartialEq)]
pub struct Cores {
    k: Array4<f32>,
    v: Array4<f32>,
}

impl Cores {
    /// How many groups are merged.
    pub fn len(&self) -> usize {
        self.k.dim().2
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Queries, keys and values with [`Cores`] that were kept: the queries are
/// those of the last tokens.
#[derive(Debug)]
pub struct Cored<'a, T> {
    /// The arrays.
    pub qkv: Qkv<'a, T>,
    /// Of all groups that the queries see as such; more do no harm.
    pub cores: &'a Cores,
}

impl<'a, T> Cored<'a, T> {
    /// Both together.
    pub fn new<'b: 'a>(qkv: Qkv<'b, T>, cores: &'a Cores) -> Self {
        Self { qkv: qkv.reborrow(), cores }
    }
}

impl<T> Clone for Cored<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Cored<'_, T> {}

impl<T: Element> Input for Cored<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        self.qkv.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        Input::out_dim(&self.qkv)
    }
}

impl<T: Element> Tokens for Cored<'_, T> {
    fn bytes(&self) -> usize {
        self.qkv.bytes() + (self.cores.k.len() + self.cores.v.len()) * size_of::<f32>()
    }
}

/// CCA: core context aware attention.
///
/// ```text
/// a_m     = softmax_{j in group m} scale q_{last token of m} . k_j      group m: tokens m g .. (m + 1) g
/// K_m     = sum_j a_mj k_j,   V_m = sum_j a_mj v_j                      its core
/// M(t)    = floor((t + 1 - s) / g), at least 0
/// o_t     = softmax attention of q_t on the cores m < M(t) and the keys M(t) g .. t
/// ```
///
/// The far past is seen in groups of `g` tokens, merged with the weights that
/// the last query of each gives them, the near past of at least `s` tokens as it
/// is, and every token once. A core counts as one key. From "Core Context Aware
/// Transformers for Long Context Language Modeling" (arXiv 2412.12465); causal,
/// no learned parameters. Each query head has cores of its own.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, of at most `t / g + s +
/// g` of a query; the cores cost as much as `g` pairs a token. In decoding
/// [`Cores`] are kept, and queries read these and the last `s + g` tokens.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::{Cca, Cored}};
/// use ndarray::{Array4, Axis, concatenate, s};
///
/// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let cca = Cca::builder(16, 128).build()?;
/// let whole = cca.forward(Qkv::new(x.view(), x.view(), x.view()))?;
///
/// // A prompt of 400 tokens, then one after the other.
/// let at = |from: usize, to: usize| {
///     let keys = x.slice(s![.., .., ..to, ..]);
///     Qkv::new(x.slice(s![.., .., from..to, ..]), keys, keys)
/// };
/// let mut cores = cca.cores(at(0, 400))?;
/// for n in 401..=500 {
///     cca.extend(&mut cores, at(n - 1, n))?;
///     let step = cca.forward(Cored::new(at(n - 1, n), &cores))?;
///     let want = whole.slice(s![.., .., n - 1..n, ..]);
///     assert!(step.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5));
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cca {
    near: Config<Near, Plain>,
    merging: Merging,
}

impl Cca {
    /// Groups of `group` tokens, of all but the last `near` tokens and less than
    /// a group.
    pub fn builder(group: usize, near: usize) -> CcaBuilder {
        CcaBuilder::with(group, near)
    }

    /// The cores of all tokens.
    ///
    /// # Errors
    /// As [`extend`](Self::extend).
    pub fn cores<T: Element>(&self, x: Qkv<'_, T>) -> Result<Cores> {
        let Dims { batch, q_heads, head_dim, value_dim, .. } = full(&x)?;
        let none = |dim| filled("cores", (batch, q_heads, 0, dim), 0f32);
        let mut cores = Cores { k: none(head_dim)?, v: none(value_dim)? };
        self.extend(&mut cores, x)?;
        Ok(cores)
    }

    /// Merges the groups that are complete and not known yet. The queries are
    /// those of the last tokens, the last token of each of these groups among
    /// them; the keys and values are those of all tokens.
    ///
    /// # Errors
    /// Arrays that do not fit, or a group whose last query is not among them.
    pub fn extend<T: Element>(&self, cores: &mut Cores, x: Qkv<'_, T>) -> Result<()> {
        let dims = self.fitting(&x, cores)?;
        let groups = cores.len()..(dims.kv_len / self.group()).max(cores.len());
        let (k, v) = pass::once(|pass| {
            let [k, v] = self.merge(pass, &x, groups.clone())?;
            Ok((k.view().to_owned(), v.view().to_owned()))
        })?;
        for (known, new) in [(&mut cores.k, k), (&mut cores.v, v)] {
            let too_large = |_| Error::too_large("cores", format_args!("{:?}", new.dim()));
            *known = concatenate(Axis(2), &[known.view(), new.view()]).map_err(too_large)?;
        }
        Ok(())
    }

    fn group(&self) -> usize {
        self.near.mask().group
    }

    /// Checks the arrays, and that cores fit them.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, cores: &Cores) -> Result<Dims> {
        let dims = full(x)?;
        let want = |dim| (dims.batch, dims.q_heads, cores.len(), dim);
        for (array, dim) in [(&cores.k, dims.head_dim), (&cores.v, dims.value_dim)] {
            if array.dim() != want(dim) {
                let expected = format!("[batch, q_heads, groups, dim] = {:?}", want(dim));
                return Err(Error::shape("cores", expected, array.shape()));
            }
        }
        Ok(dims)
    }

    /// Keys and values of cores.
    fn merge<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        x: &Qkv<'_, T>,
        groups: Range<usize>,
    ) -> Result<[Scratch<'p>; 2]> {
        let (g, dims) = (self.group(), x.dims()?);
        // The row of the last query of the first group.
        let first = ((groups.start + 1) * g - 1 + dims.q_len).checked_sub(dims.kv_len);
        let Some(first) = first.or(groups.is_empty().then_some(0)) else {
            let expected = format!("the queries of the tokens from {} on", (groups.start + 1) * g - 1);
            return Err(Error::value(
                "q",
                expected,
                format_args!("the last {} of {}", dims.q_len, dims.kv_len),
            ));
        };
        let rows = if groups.is_empty() { 0..0 } else { first..first + (groups.len() - 1) * g + 1 };
        let q = x.q.slice(s![.., .., rows; g, ..]);
        let of_groups = s![.., .., groups.start * g..groups.end * g, ..];
        let (k, v) = (x.k.slice(of_groups), x.v.slice(of_groups));
        Ok([self.merging.run(pass, q, k, k)?, self.merging.run(pass, q, k, v)?])
    }

    fn define_from<R: Real, T: Element>(&self, x: &Qkv<'_, T>, cores: Option<&Cores>) -> Result<Array4<R>> {
        let (dims, g) = (x.dims()?, self.group());
        Ok(of_heads(&dims, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            let v: Array2<R> = head.rows(&x.v, &head.keys);
            let cores = match cores {
                Some(cores) => {
                    let all = 0..cores.len();
                    [head.rows(&cores.k.view(), &all), head.rows(&cores.v.view(), &all)]
                }
                None => {
                    let last = q.slice(s![(g - 1).min(q.dim().0)..; g, ..]).to_owned();
                    [&k, &v].map(|rows| self.merging.define([&last, &k, rows]))
                }
            };
            virtuals::define(&self.near, [&q, &k, &v], cores.each_ref(), |i, m| {
                let position = (i + dims.kv_len).checked_sub(dims.q_len);
                position.is_some_and(|t| (m + 1) * g <= self.near.mask().far(t))
            })
        }))
    }
}

/// The sizes of a batch whose sequences are all of it.
fn full<T: Element>(x: &Qkv<'_, T>) -> Result<Dims> {
    let dims = x.dims()?;
    if x.lengths != Lengths::Full {
        let reason = "all sequences have as many groups";
        return Err(Error::Conflict { option: "sequences of other lengths", with: "cores", reason });
    }
    Ok(dims)
}

options! {
    /// Builds a [`Cca`].
    CcaBuilder of Cca, scale "1 / sqrt(head_dim)" isa;
    given { group: usize; near: usize; }
    flags {
        /// Cores are the means of their groups instead.
        mean;
    }
    build(this, config) {
        let CcaBuilder { group, near, mean, .. } = this;
        for (name, tokens, least) in [("group", group, 1), ("near", near, 0)] {
            if tokens < least || u32::try_from(tokens).is_err() {
                return Err(Error::value(name, format!("from {least} to 2^32 - 1 tokens"), tokens));
            }
        }
        // Weights of equal scores are those of a mean.
        let merging = Merging::new(group, if mean { Some(0.0) } else { config.scale }, config.isa)?;
        let mask = Near { group, near };
        let near = Options { mask, score: Plain, scale: config.scale, isa: Some(config.isa) }.build()?;
        Ok(Cca { near, merging })
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Cca {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let Dims { q_len, kv_len, .. } = full(&x)?;
        if q_len != kv_len {
            let expected = format!("the queries of all {kv_len} tokens, for their cores");
            return Err(Error::value("q", expected, q_len));
        }
        let [k, v] = self.merge(pass, &x, 0..kv_len / self.group())?;
        virtuals::attend(&self.near, pass, x, [k.view(), v.view()], self.near.mask().sight(), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.dry(x, None, false)?;
        Ok((self.define_from(&x, None)?, ()))
    }
}
composite!(Cca, Qkv);

impl<T: Element> Pipeline<Cored<'_, T>> for Cca {
    type State = ();

    fn flow(&self, x: Cored<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.fitting(&x.qkv, x.cores)?;
        let seen = dims.kv_len.checked_sub(1).map_or(0, |t| self.near.mask().far(t) / self.group());
        if x.cores.len() < seen {
            let expected = format!("at least {seen} groups, of {} tokens", dims.kv_len);
            return Err(Error::value("cores", expected, x.cores.len()));
        }
        let cores = [x.cores.k.view(), x.cores.v.view()];
        virtuals::attend(&self.near, pass, x.qkv, cores, self.near.mask().sight(), out)
    }

    fn define<R: Real>(&self, x: Cored<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.dry(x, None, false)?;
        Ok((self.define_from(&x.qkv, Some(x.cores))?, ()))
    }
}
composite!(Cca, Cored);

exhibit! {
    CcaExhibit of Cca, "sparse", "CCA", "arXiv 2412.12465";
    "the last 24 to 31 tokens as they are and what comes before in groups of 8, each merged into one, causal";
    not "where single tokens of the far past matter: groups hide them";
    tokens true;
    build(_, _) { Cca::builder(8, 24) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Cca, CcaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::sparse::testing::{Arrays, near};
    use crate::testing::qkv::held;

    fn cca(group: usize, near: usize) -> Cca {
        Cca::builder(group, near).build().unwrap()
    }

    #[test]
    fn all_near_or_alone_is_dense_and_the_mean_of_equal_tokens_is_one_of_them() {
        let x = Arrays::normal([2, 4, 2, 300, 300, 24, 12], 1);
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        for (group, near_) in [(16, 300), (7, 1000), (1, 0), (1, 40)] {
            near(&format!("{group} {near_}"), &cca(group, near_).forward(x.qkv()).unwrap(), &want);
        }
        // Equal keys in a group: both poolings are means.
        let mut x = x;
        for j in 0..300 {
            let first = x.k.slice(s![.., .., j / 8 * 8, ..]).to_owned();
            x.k.slice_mut(s![.., .., j, ..]).assign(&first);
        }
        let mean = Cca::builder(8, 50).mean().build().unwrap();
        near("means", &cca(8, 50).forward(x.qkv()).unwrap(), &mean.forward(x.qkv()).unwrap());
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for (n, group, near) in [(0, 4, 3), (1, 4, 0), (70, 4, 9), (333, 16, 100), (150, 7, 20)] {
            let x = Arrays::normal([2, 4, 2, n, n, 24, 12], n as u64);
            held(&cca(group, near), x.qkv());
            held(&Cca::builder(group, near).mean().scale(2.0).build().unwrap(), x.qkv());
        }
    }

    /// Groups and what is near are all tokens up to the query's, each once.
    #[test]
    fn every_token_is_seen_once() {
        for (group, near) in [(4, 9), (16, 3), (7, 0), (5, 12)] {
            let mask = Near { group, near };
            for t in 0..200 {
                let site = Site { batch: 0, head: 0, q_len: 200, kv_len: 200 };
                let mut words = [0; 4];
                mask.sight().fill(t as isize, 0, 200, &mut words);
                let cores = words.iter().map(|word| word.count_ones() as usize).sum::<usize>();
                assert_eq!(mask.seen(&site, t), cores * group..t + 1, "{group} {near} {t}");
                assert!(t + 1 - cores * group >= near.min(t + 1));
            }
        }
    }

    #[test]
    fn decoding_is_the_last_row() {
        let x = Arrays::normal([2, 4, 2, 120, 120, 24, 12], 3);
        let at = |rows: Range<usize>| {
            let keys = s![.., .., ..rows.end, ..];
            Qkv::new(x.q.slice(s![.., .., rows, ..]), x.k.slice(keys), x.v.slice(keys))
        };
        let cca = cca(8, 21);
        let whole = cca.forward(x.qkv()).unwrap();
        let mut cores = cca.cores(at(0..50)).unwrap();
        for cut in [50..51, 51..60, 60..64, 64..120] {
            cca.extend(&mut cores, at(cut.clone())).unwrap();
            let x = Cored::new(at(cut.clone()), &cores);
            held(&cca, x);
            near("step", &cca.forward(x).unwrap(), &whole.slice(s![.., .., cut, ..]).to_owned());
        }
        assert_eq!(cores.len(), 15);
        let once = cca.cores(x.qkv()).unwrap();
        near("keys", &cores.k, &once.k);
        near("values", &cores.v, &once.v);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: CcaBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Cca::builder(0, 3)).starts_with("group: "));
        assert!(refusal(Cca::builder(4, usize::MAX)).starts_with("near: "));
        let (x, cca) = (Arrays::normal([1, 2, 1, 5, 60, 8, 4], 1), cca(8, 8));
        assert!(cca.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
        assert!(cca.cores(x.qkv()).unwrap_err().to_string().starts_with("q: "));
        let all = Arrays::normal([1, 2, 1, 60, 60, 8, 4], 1);
        let few = cca.cores(Qkv::new(all.q.view(), all.k.view(), all.v.view())).unwrap();
        let few = Cores {
            k: few.k.slice(s![.., .., ..3, ..]).to_owned(),
            v: few.v.slice(s![.., .., ..3, ..]).to_owned(),
        };
        assert!(cca.forward(Cored::new(x.qkv(), &few)).unwrap_err().to_string().starts_with("cores: "));
        let other = Arrays::normal([1, 4, 1, 5, 60, 8, 4], 1);
        assert!(cca.forward(Cored::new(other.qkv(), &few)).unwrap_err().to_string().starts_with("cores: "));
        assert!(cca.forward(all.qkv().key_lengths(&[3])).is_err());
    }
}
