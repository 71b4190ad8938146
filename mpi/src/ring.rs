//! Ring attention: keys and values travel, queries stay.
//!
//! ```text
//! o_i, lse_i = merge over runs R of keys, from this rank's own back to those of the next rank,
//!              of softmax attention of query i over the visible keys of R
//! ```
//!
//! "Ring Attention with Blockwise Transformers" (arXiv 2310.01889), with the cut of
//! [`Cut::zigzag`] for causal attention, so that no rank idles. In `ranks - 1` steps the
//! keys and values of each rank come by every other; a rank sends `(ranks - 1) (head_dim +
//! value_dim) kv_heads` elements for each token that it holds, and has no more than the keys and
//! values of one other rank at a time. Partial results are `f32` whatever the inputs are, and
//! merge as they are made: the order in which ranks come by is always the same.
//!
//! Backward, `d_k` and `d_v` travel with their keys and come home with the last step; each
//! part is the gradient given the output and LSE of the whole.

use std::collections::BTreeMap;
use std::ops::Range;

use attention_kernels::dense::{Dense, SavedForward, SoftmaxGradients};
use attention_kernels::mask::{Causal, Mask, Unmasked};
use attention_kernels::{Backward, Element, Mergeable, Qkv, merge};
use ndarray::{Array3, Array4, ArrayView3, ArrayView4, s};

use crate::error::{Error, Result};
use crate::plan::{Cut, fingerprint};
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// Attention over a sequence that is cut over ranks.
#[derive(Clone, Debug)]
pub struct Ring {
    cut: Cut,
    /// Offsets of sequences in the tokens that are cut.
    sequences: Vec<usize>,
    causal: bool,
    scale: Option<f32>,
}

/// What a rank has of the result: the rows of its own queries.
#[derive(Clone, Debug, PartialEq)]
pub struct Attended {
    /// `[batch, q_heads, held, value_dim]`.
    pub out: Array4<f32>,
    /// `[batch, q_heads, held]`, -inf where nothing is visible.
    pub lse: Array3<f32>,
}

impl Attended {
    /// Of no keys.
    pub(crate) fn empty(dim: (usize, usize, usize, usize)) -> Self {
        Self { out: Array4::zeros(dim), lse: Array3::from_elem((dim.0, dim.1, dim.2), f32::NEG_INFINITY) }
    }

    pub(crate) fn merge(&mut self, other: &Self) -> Result<(), String> {
        merge::merge_into(self.out.view_mut(), self.lse.view_mut(), other.out.view(), other.lse.view())
            .map_err(|error| error.to_string())
    }

    /// The output in the type of the inputs: rounded once.
    pub fn rounded<T: Element>(&self) -> Array4<T> {
        self.out.mapv(T::from_f32)
    }
}

/// What meets in a block: rows of queries and of keys of two ranks, and where the first
/// query sits among these keys.
pub(crate) struct Block {
    run: usize,
    queries: Range<usize>,
    keys: Range<usize>,
    q_start: isize,
}

impl Ring {
    /// One sequence, everything visible.
    pub fn new(cut: Cut) -> Self {
        let sequences = vec![0, cut.tokens()];
        Self { cut, sequences, causal: false, scale: None }
    }

    /// A token sees itself and those before it.
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// The factor of scores; `1 / sqrt(head_dim)` otherwise.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Sequences that lie one after the other in the tokens that are cut, with these offsets
    /// (`cu_seqlens`): nothing crosses from one to another, wherever ranks are cut.
    /// Tokens after the last offset see and are seen by nothing.
    pub fn packed(self, offsets: impl Into<Vec<usize>>) -> Self {
        Self { sequences: offsets.into(), ..self }
    }

    /// The cut.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Output and LSE of the queries of this rank: arrays `[batch, heads, held, dim]`, with
    /// as many tokens as the cut gives the rank.
    ///
    /// # Errors
    /// The same on all ranks: the lowest one whose arrays, cut or options do not fit.
    pub fn forward<T: Stored>(
        &self,
        group: &Group,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<Attended> {
        const CALL: &str = "ring forward";
        self.agree(group, CALL, &q, &k, &v, None)?;
        let (me, ranks) = (group.rank(), group.size());
        let mut all = Attended::empty((q.dim().0, q.dim().1, q.dim().2, v.dim().3));
        let mut travelling = Vec::new();
        pack(k.view(), &mut travelling);
        pack(v.view(), &mut travelling);
        let mut said = Ok(());
        for step in 0..ranks {
            let owner = comes_by(me, ranks, step);
            if said.is_ok() {
                let (keys, values) = self.open::<T>(&travelling, owner, &k, &v);
                said = self.meet(me, owner, (&q, &keys, &values), &mut all);
            }
            if step + 1 < ranks {
                travelling = self.turn(group, travelling, owner, size_of::<T>() * width(&k, &v));
            }
        }
        group.close(CALL, said.map(|()| all))
    }

    /// Gradients of this rank's queries, keys and values, given that of its output, and what
    /// [`forward`](Self::forward) gave.
    ///
    /// # Errors
    /// As `forward`, and for gradients or results of other shapes.
    pub fn backward<T: Stored>(
        &self,
        group: &Group,
        (q, k, v): (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>),
        d_out: ArrayView4<'_, f32>,
        saved: &Attended,
    ) -> Result<SoftmaxGradients> {
        const CALL: &str = "ring backward";
        self.agree(group, CALL, &q, &k, &v, Some((&d_out, saved)))?;
        let (me, ranks) = (group.rank(), group.size());
        let mut d_q = Array4::<f32>::zeros(q.dim());
        let mut travelling = Vec::new();
        pack(k.view(), &mut travelling);
        pack(v.view(), &mut travelling);
        travelling.resize(travelling.len() + 4 * (k.len() + v.len()), 0);
        let mut said = Ok(());
        for step in 0..ranks {
            let owner = comes_by(me, ranks, step);
            let (keys, values) = self.open::<T>(&travelling, owner, &k, &v);
            let at = (keys.len() + values.len()) * size_of::<T>();
            let mut rest = &travelling[at..];
            let mut d_k: Array4<f32> = unpack(&mut rest, keys.dim());
            let mut d_v: Array4<f32> = unpack(&mut rest, values.dim());
            if said.is_ok() {
                for block in self.blocks(me, owner) {
                    said = self.back(
                        &block,
                        (&q, &keys, &values),
                        &d_out,
                        saved,
                        (&mut d_q, &mut d_k, &mut d_v),
                    );
                    if said.is_err() {
                        break;
                    }
                }
            }
            travelling.truncate(at);
            pack(d_k.view(), &mut travelling);
            pack(d_v.view(), &mut travelling);
            travelling = self.turn(group, travelling, owner, (size_of::<T>() + 4) * width(&k, &v));
        }
        let mut rest = &travelling[(k.len() + v.len()) * size_of::<T>()..];
        let (d_k, d_v) = (unpack(&mut rest, k.dim()), unpack(&mut rest, v.dim()));
        group.close(CALL, said.map(|()| SoftmaxGradients::new(d_q, d_k, d_v)))
    }

    /// Hands what travels, which is the owner's, to the next rank, and takes what the one before has.
    fn turn(&self, group: &Group, travelling: Vec<u8>, owner: usize, token: usize) -> Vec<u8> {
        let (me, ranks) = (group.rank(), group.size());
        let next = (owner + ranks - 1) % ranks;
        let mut into = vec![0; self.cut.held(next) * token];
        group.pass((me + 1) % ranks, &travelling, (me + ranks - 1) % ranks, &mut into);
        into
    }

    /// Keys and values of a rank.
    pub(crate) fn open<T: Stored>(
        &self,
        mut bytes: &[u8],
        owner: usize,
        k: &ArrayView4<'_, T>,
        v: &ArrayView4<'_, T>,
    ) -> (Array4<T>, Array4<T>) {
        let of = |x: &ArrayView4<'_, T>| (x.dim().0, x.dim().1, self.cut.held(owner), x.dim().3);
        (unpack(&mut bytes, of(k)), unpack(&mut bytes, of(v)))
    }

    /// What of the queries of one rank meets what of the keys of another.
    pub(crate) fn blocks(&self, mine: usize, owner: usize) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (run, keys, key_row) in rows(self.cut.runs(owner)) {
            for (_, queries, query_row) in rows(self.cut.runs(mine)) {
                for pair in self.sequences.windows(2) {
                    let within = |run: &Range<usize>| run.start.max(pair[0])..run.end.min(pair[1]);
                    let (q, k) = (within(&queries), within(&keys));
                    if q.is_empty() || k.is_empty() || (self.causal && k.start >= q.end) {
                        continue;
                    }
                    let at = |part: &Range<usize>, run: &Range<usize>, row: usize| {
                        part.start - run.start + row..part.end - run.start + row
                    };
                    blocks.push(Block {
                        run,
                        queries: at(&q, &queries, query_row),
                        keys: at(&k, &keys, key_row),
                        q_start: q.start as isize - k.start as isize,
                    });
                }
            }
        }
        blocks
    }

    fn dense<M: Mask>(&self, mask: M) -> Result<Dense<M>, String> {
        let builder = Dense::builder().mask(mask);
        let builder = match self.scale {
            Some(scale) => builder.scale(scale),
            None => builder,
        };
        builder.build().map_err(|error| error.to_string())
    }

    /// Attention over the keys of one rank, a partial result for each run of them.
    pub(crate) fn meet<T: Stored>(
        &self,
        me: usize,
        owner: usize,
        (q, keys, values): (&ArrayView4<'_, T>, &Array4<T>, &Array4<T>),
        all: &mut Attended,
    ) -> Result<(), String> {
        let mut parts: BTreeMap<usize, Attended> = BTreeMap::new();
        for block in self.blocks(me, owner) {
            let x = Qkv::new(
                q.slice(s![.., .., block.queries.clone(), ..]),
                keys.slice(s![.., .., block.keys.clone(), ..]),
                values.slice(s![.., .., block.keys.clone(), ..]),
            )
            .widened();
            let done = if self.causal {
                self.dense(Causal::at(block.q_start))?.forward_with_lse(x)
            } else {
                self.dense(Unmasked)?.forward_with_lse(x)
            };
            let (out, lse) = done.map_err(|error| error.to_string())?;
            let part = parts.entry(block.run).or_insert_with(|| Attended::empty(all.out.dim()));
            part.out.slice_mut(s![.., .., block.queries.clone(), ..]).assign(&out);
            part.lse.slice_mut(s![.., .., block.queries]).assign(&lse);
        }
        parts.values().try_for_each(|part| all.merge(part))
    }

    pub(crate) fn back<T: Stored>(
        &self,
        block: &Block,
        (q, k, v): (&ArrayView4<'_, T>, &Array4<T>, &Array4<T>),
        d_out: &ArrayView4<'_, f32>,
        saved: &Attended,
        (d_q, d_k, d_v): (&mut Array4<f32>, &mut Array4<f32>, &mut Array4<f32>),
    ) -> Result<(), String> {
        let (queries, keys) = (block.queries.clone(), block.keys.clone());
        let x = Qkv::new(
            q.slice(s![.., .., queries.clone(), ..]),
            k.slice(s![.., .., keys.clone(), ..]),
            v.slice(s![.., .., keys.clone(), ..]),
        )
        .widened();
        let out: ArrayView4<'_, f32> = saved.out.slice(s![.., .., queries.clone(), ..]);
        let lse: ArrayView3<'_, f32> = saved.lse.slice(s![.., .., queries.clone()]);
        let carried = SavedForward { softmax: Some((out, lse)) };
        let d_out = d_out.slice(s![.., .., queries.clone(), ..]);
        let got = if self.causal {
            self.dense(Causal::at(block.q_start))?.backward(x, d_out, carried)
        } else {
            self.dense(Unmasked)?.backward(x, d_out, carried)
        };
        let got = got.map_err(|error| error.to_string())?;
        let mut sum = d_q.slice_mut(s![.., .., queries, ..]);
        sum += &got.q;
        let mut sum = d_k.slice_mut(s![.., .., keys.clone(), ..]);
        sum += &got.k;
        let mut sum = d_v.slice_mut(s![.., .., keys, ..]);
        sum += &got.v;
        Ok(())
    }

    /// Whether all ranks are at the same call with arrays that go together.
    pub(crate) fn agree<T: Stored>(
        &self,
        group: &Group,
        call: &'static str,
        q: &ArrayView4<'_, T>,
        k: &ArrayView4<'_, T>,
        v: &ArrayView4<'_, T>,
        back: Option<(&ArrayView4<'_, f32>, &Attended)>,
    ) -> Result<()> {
        let mine = self.check(group, q, k, v, back).map(|()| {
            let options = [u64::from(self.causal), self.scale.map_or(u64::MAX, |x| u64::from(x.to_bits()))];
            let plan = fingerprint(self.sequences.iter().map(|&x| x as u64));
            let sizes = [q.dim().0, q.dim().1, k.dim().1, k.dim().3, v.dim().3, size_of::<T>()];
            let dtype = T::ROUNDING.to_bits();
            sizes
                .map(|x| x as u64)
                .into_iter()
                .chain(options)
                .chain([dtype, plan, self.cut.fingerprint()])
                .collect()
        });
        let all = group.agree(call, mine)?;
        const NAMES: [&str; 11] = [
            "q: batch",
            "q: heads",
            "k: heads",
            "k: head_dim",
            "v: value_dim",
            "q: bytes of an element",
            "causal",
            "scale: bits",
            "q: type",
            "sequences: fingerprint",
            "cut: fingerprint",
        ];
        same(&all, &NAMES)
    }

    fn check<T: Stored>(
        &self,
        group: &Group,
        q: &ArrayView4<'_, T>,
        k: &ArrayView4<'_, T>,
        v: &ArrayView4<'_, T>,
        back: Option<(&ArrayView4<'_, f32>, &Attended)>,
    ) -> Result<(), String> {
        if self.cut.ranks() != group.size() {
            return Err(format!("cut: expected one for {} ranks, got {}", group.size(), self.cut.ranks()));
        }
        let held = self.cut.held(group.rank());
        for (name, x) in [("q", q), ("k", k), ("v", v)] {
            if x.dim().2 != held {
                return Err(format!("{name}: expected len {held} as the cut has it, got {:?}", x.shape()));
            }
        }
        let sorted = self.sequences.windows(2).all(|pair| pair[0] <= pair[1]);
        if self.sequences.first() != Some(&0) || !sorted || self.sequences.last() > Some(&self.cut.tokens()) {
            let most = self.cut.tokens();
            return Err(format!(
                "sequences: expected non-decreasing offsets from 0 to at most {most}, got {:?}",
                self.sequences
            ));
        }
        Qkv::new(q.view(), k.view(), v.view()).dims().map_err(|error| error.to_string())?;
        self.dense(Unmasked)?;
        if let Some((d_out, saved)) = back {
            let want = [q.dim().0, q.dim().1, held, v.dim().3];
            for (name, got) in [("d_out", d_out.shape()), ("saved.out", saved.out.shape())] {
                if got != want {
                    return Err(format!("{name}: expected shape {want:?}, got {got:?}"));
                }
            }
            if saved.lse.shape() != &want[..3] {
                return Err(format!(
                    "saved.lse: expected shape {:?}, got {:?}",
                    &want[..3],
                    saved.lse.shape()
                ));
            }
        }
        Ok(())
    }
}

/// Whose keys a rank has in each step: its own first, and those of the next rank last.
pub(crate) fn comes_by(me: usize, ranks: usize, step: usize) -> usize {
    (me + ranks - step) % ranks
}

/// Refuses ranks that differ from rank 0 in what must be the same.
pub(crate) fn same(all: &[Vec<u64>], names: &[&str]) -> Result<()> {
    for (rank, theirs) in all.iter().enumerate() {
        for (i, name) in names.iter().enumerate() {
            if theirs.get(i) != all[0].get(i) {
                let word = |x: Option<&u64>| x.map_or("nothing".to_owned(), u64::to_string);
                let (want, got) = (word(all[0].get(i)), word(theirs.get(i)));
                return Err(Error::Argument {
                    rank,
                    message: format!("{name}: expected {want} as rank 0 has it, got {got}"),
                });
            }
        }
    }
    Ok(())
}

/// Elements of one token's keys and values.
pub(crate) fn width<T>(k: &ArrayView4<'_, T>, v: &ArrayView4<'_, T>) -> usize {
    k.dim().0 * (k.dim().1 * k.dim().3 + v.dim().1 * v.dim().3)
}

/// Runs with their numbers and the row at which each begins.
fn rows(runs: &[Range<usize>]) -> impl Iterator<Item = (usize, Range<usize>, usize)> + '_ {
    runs.iter().enumerate().scan(0, |row, (i, run)| {
        let at = *row;
        *row += run.len();
        Some((i, run.clone(), at))
    })
}
