//! What [`Dense`] becomes with each mask and each change of scores: entries of
//! the catalogue that are no types of their own.

use ndarray::{Array2, Array3, Array4, ArrayViewMut4};

use super::{Entry, Shows, Trial, common};
use crate::attention::Cost;
use crate::card::{Card, exhibit};
use crate::dense::Dense;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::mask::{And, Causal, Documents, Mask, Prefix, Tree, Unmasked, Window, mask_fn};
use crate::score::{Alibi, Forget, RelativeTable, Softcap, score_fn};
use crate::simd::Isa;

exhibit! {
    CausalExhibit of Dense<Causal>, "dense", "causal", "arXiv 1706.03762";
    "keys at the query's position and before";
    not "beyond some ten thousand keys of which few matter: the cost grows with the square of the length";
    tokens false;
    build(_, _) { Dense::builder().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    WindowExhibit of Dense<Window>, "dense", "sliding window", "arXiv 2004.05150, 2310.06825";
    "the last 48 keys before the query";
    not "where a token must reach further back than the window";
    tokens false;
    build(_, _) { Dense::builder().mask(Window::new(Some(48), Some(0))) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    PrefixExhibit of Dense<Prefix>, "dense", "prefix LM", "arXiv 1910.10683";
    "a prefix in both directions, causal after it";
    not "where every token is generated: causal alone";
    tokens false;
    build(x, _) { Dense::builder().mask(Prefix::new(x.k.dim().2 / 4)) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    DocumentsExhibit of Dense<And<Documents, Causal>>, "dense", "documents", "arXiv 2107.02027";
    "causal within each of several documents in one sequence";
    not "where documents are runs: a packed batch needs no mask";
    tokens false;
    build(x, field) {
        let (queries, keys) = (x.q.dim().2, x.k.dim().2);
        let mut id = 0;
        let mut ids: Vec<u32> = Vec::with_capacity(keys);
        for j in 0..keys {
            id += u32::from(field.at(1, 0, j, 0) > 0.97);
            ids.push(id);
        }
        // The last query sits at the last key.
        let of_query = |i: usize| (i + keys).checked_sub(queries).map_or(0, |at| ids[at]);
        let query_ids: Vec<u32> = (0..queries).map(of_query).collect();
        Dense::builder().mask(Documents::of(&query_ids, &ids).and(Causal::new()))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    TreeExhibit of Dense<Tree>, "dense", "tree", "arXiv 2305.09781, 2401.10774";
    "a draft tree for speculative decoding: a context and the node's ancestors";
    not "where drafts are a chain: causal alone";
    tokens false;
    build(x, field) {
        let parent = |i: usize| {
            i.checked_sub(1).map(|last| last - (last.min(3) as f32 * field.at(1, 0, i, 0).abs()) as usize)
        };
        let parents: Vec<_> = (0..x.q.dim().2).map(parent).collect();
        Dense::builder().mask(Tree::new(&parents)?)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    AlibiExhibit of Dense<Causal, Alibi>, "dense", "ALiBi", "arXiv 2108.12409";
    "causal, with a penalty that grows with distance at a slope per head";
    not "where positions come by rotation";
    tokens false;
    build(x, _) { Dense::builder().causal().score(Alibi::new(x.q.dim().1)) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    ForgettingExhibit of Dense<Causal, Forget>, "dense", "forgetting", "arXiv 2503.02130";
    "causal, with scores that fade by what each token between key and query makes forget";
    not "where the state of a recurrence is enough: that costs the same for every token";
    tokens false;
    build(x, field) {
        let ((batch, heads, ..), len) = (x.q.dim(), x.k.dim().2);
        // Mostly some per cent a token, now and then everything.
        let gate = |(_, h, j): (usize, usize, usize)| match field.at(1, h, j, 0) {
            most if most > 0.99 => f32::NEG_INFINITY,
            some => -0.1 * some.abs(),
        };
        Dense::builder().causal().score(Forget::new(Array3::from_shape_fn((batch, heads, len), gate).view())?)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    SoftcapExhibit of Dense<Causal, Softcap>, "dense", "softcap", "arXiv 2408.00118";
    "causal, with scores squashed to -5..5 by a tanh";
    not "where the model was trained without: a tanh a score costs time";
    tokens false;
    build(_, _) { Dense::builder().causal().score(Softcap::new(5.0)?) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    SinksExhibit of Dense<Causal>, "dense", "sinks", "arXiv 2309.17453, 2508.10925";
    "causal, with a logit per head that takes weight and has no value";
    not "where the model has real sink tokens: keep those in the cache";
    tokens false;
    build(x, field) {
        let sinks: Vec<f32> = (0..x.q.dim().1).map(|h| 4.0 * field.at(1, h, 0, 0)).collect();
        Dense::builder().causal().sinks(sinks)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    RelativeExhibit of Dense<Unmasked, RelativeTable>, "dense", "relative positions",
        "arXiv 1910.10683, 2103.14030";
    "a learned bias for each head and distance, clipped at 24";
    not "where distances beyond the table must differ";
    tokens false;
    build(x, field) {
        // A table has a row even where there are no heads.
        let bias = |(h, c): (usize, usize)| 3.0 * field.at(1, h, 0, c);
        Dense::builder().score(RelativeTable::new(Array2::from_shape_fn((x.q.dim().1.max(1), 49), bias))?)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

/// A mask and a change of scores of the caller's own, whose types have no
/// names.
pub(super) const CLOSURES: Entry = Entry {
    card: &Card {
        name: "closures",
        family: "dense",
        mechanism: "Dense<MaskFn, ScoreFn>",
        source: "arXiv 2412.05496",
        summary: "a mask and a change of scores of the caller's own",
        when_not: "where a built-in mask says the same: it is skipped by the tile unseen",
    },
    tokens: false,
    selects: false,
    weighs: true,
    make_f32: closures,
    make_f16: closures,
    make_bf16: closures,
};

fn closures<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
    // Every third key, and a reward for keys at even distances.
    let mask = mask_fn(|_, query, key| (query + key) % 3 != 1);
    let score = score_fn(|score, _, query, key| score + ((query ^ key) & 1) as f32 * -0.5);
    let builder = Dense::builder().mask(mask).score(score);
    let builder = match isa {
        Some(isa) => builder.isa(isa),
        None => builder,
    };
    Ok(Box::new(OnQkv { mechanism: builder.build()?, x }))
}

struct OnQkv<'a, T, A> {
    mechanism: A,
    x: Qkv<'a, T>,
}

impl<T: Element, A: for<'b> Shows<Qkv<'b, T>>> Trial<T> for OnQkv<'_, T, A> {
    common!(self, self.mechanism, self.x.reborrow());

    fn weights(&self) -> Result<Array4<f32>> {
        self.mechanism.weights(self.x.reborrow())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.mechanism.reference_weights(self.x.reborrow())
    }
}
