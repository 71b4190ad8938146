//! CCA: core context aware attention.

use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView4, s};

use crate::cache::cored::{Cored, Cores};
use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::Sight;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::mask::Recent;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{self, Defined, Out, Pass, Pipeline, Scratch, composite};
use crate::stages::virtuals::{self, Merging};

mod cached;

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
/// [`Cores`] are kept, and queries read these and the last `s + g` tokens: over arrays
/// ([`Cored`]) or, in prefill as well, over caches
/// ([`CoredCache`](crate::sparse::CoredCache)), packed queries included.
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
    near: Config<Recent, Plain>,
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
        let mut cores = Cores::none([batch, q_heads], [head_dim, value_dim])?;
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
        let [k, v] = pass::once(|pass| {
            let [k, v] = self.merge(pass, &x, groups.clone())?;
            Ok([k.view().to_owned(), v.view().to_owned()])
        })?;
        cores.reserve(groups.end)?;
        cores.put(0..dims.batch, groups, [k.view(), v.view()]);
        Ok(())
    }

    fn group(&self) -> usize {
        self.near.mask().group
    }

    /// Which positions see cores: number `m` from `near + (m + 1) group - 1` on.
    fn sight(&self) -> Sight<'static> {
        let &Recent { group, near } = self.near.mask();
        Sight::Every { first: (near + group - 1) as isize, step: group }
    }

    /// Checks the arrays, and that cores fit them.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, cores: &Cores) -> Result<Dims> {
        let dims = full(x)?;
        cores.fit([dims.batch, dims.q_heads], [dims.head_dim, dims.value_dim])?;
        if cores.counts().iter().any(|&count| count != cores.len()) {
            let expected = "as many groups of each sequence";
            return Err(Error::value("cores", expected, format_args!("{:?}", cores.counts())));
        }
        Ok(dims)
    }

    /// Refuses fewer groups than queries of a sequence of so many tokens see.
    fn enough(&self, groups: usize, tokens: usize) -> Result<()> {
        let seen = tokens.checked_sub(1).map_or(0, |t| self.near.mask().far(t) / self.group());
        if groups < seen {
            let expected = format!("at least {seen} groups, of {tokens} tokens");
            return Err(Error::value("cores", expected, groups));
        }
        Ok(())
    }

    /// The rows from the last query of the first of some groups to that of the last, among
    /// the queries of the last tokens.
    fn last_rows(&self, groups: &Range<usize>, [queries, keys]: [usize; 2]) -> Result<Range<usize>> {
        if groups.is_empty() {
            return Ok(0..0);
        }
        let last = (groups.start + 1) * self.group() - 1;
        let Some(first) = (last + queries).checked_sub(keys) else {
            let expected = format!("the queries of the tokens from {last} on");
            return Err(Error::value("q", expected, format_args!("the last {queries} of {keys}")));
        };
        Ok(first..first + (groups.len() - 1) * self.group() + 1)
    }

    /// Keys and values of cores.
    fn merge<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        x: &Qkv<'_, T>,
        groups: Range<usize>,
    ) -> Result<[Scratch<'p>; 2]> {
        let (g, dims) = (self.group(), x.dims()?);
        let rows = self.last_rows(&groups, [dims.q_len, dims.kv_len])?;
        let q = x.q.slice(s![.., .., rows; g, ..]);
        let of_groups = s![.., .., groups.start * g..groups.end * g, ..];
        let (k, v) = (x.k.slice(of_groups), x.v.slice(of_groups));
        Ok([self.merging.run(pass, q, k, k)?, self.merging.run(pass, q, k, v)?])
    }

    /// The definition on queries, keys and values, and on cores of which a function tells the
    /// entry of a sequence, or on those of the arrays themselves.
    fn define_from<R: Real, Q: Element, K: Element>(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        (q, [k, v]): (&ArrayView4<'_, Q>, [&ArrayView4<'_, K>; 2]),
        cores: Option<(&Cores, &dyn Fn(usize) -> usize)>,
    ) -> Result<Array4<R>> {
        let g = self.group();
        Ok(of_heads(dims, lengths, |head| {
            let (q, k) = (head.rows(q, &head.queries), head.rows(k, &head.keys));
            let v: Array2<R> = head.rows(v, &head.keys);
            let (q_len, kv_len) = (q.dim().0, k.dim().0);
            let cores = match cores {
                Some((cores, entry)) => cores.views().map(|rows| {
                    rows.slice(s![entry(head.sequence), head.head, .., ..]).map(|&x| R::of(f64::from(x)))
                }),
                None => {
                    let last = q.slice(s![(g - 1).min(q.dim().0)..; g, ..]).to_owned();
                    [&k, &v].map(|rows| self.merging.define([&last, &k, rows]))
                }
            };
            virtuals::define(&self.near, [&q, &k, &v], cores.each_ref(), |i, m| {
                let position = (i + kv_len).checked_sub(q_len);
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
        let mask = Recent { group, near };
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
        virtuals::attend(&self.near, pass, x, [k.view(), v.view()], self.sight(), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.dry(x, None, false)?;
        let Qkv { q, k, v, lengths, .. } = &x;
        Ok((self.define_from(&x.dims()?, lengths, (q, [k, v]), None)?, ()))
    }
}
composite!(Cca, Qkv);

impl<T: Element> Pipeline<Cored<'_, T>> for Cca {
    type State = ();

    fn flow(&self, x: Cored<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.fitting(&x.qkv, x.cores)?;
        for &groups in x.cores.counts() {
            self.enough(groups, dims.kv_len)?;
        }
        virtuals::attend(&self.near, pass, x.qkv, x.cores.views(), self.sight(), out)
    }

    fn define<R: Real>(&self, x: Cored<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.dry(x, None, false)?;
        let (Qkv { q, k, v, lengths, .. }, own) = (&x.qkv, |sequence: usize| sequence);
        let cores = Some((x.cores, &own as &dyn Fn(usize) -> usize));
        Ok((self.define_from(&x.qkv.dims()?, lengths, (q, [k, v]), cores)?, ()))
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
mod tests;
