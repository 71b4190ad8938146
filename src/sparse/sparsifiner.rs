//! Sparsifiner: a low-rank attention says which keys each token of an image sees.

use ndarray::{Array2, ArrayView2, Axis};

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition::select::{chosen, weights};
use crate::engine::workspace::{Workspace, room};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence};
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::finding::{Search, ones};
use crate::select::gate::{self, Gate};
use crate::select::probe::{self, Probe};
use crate::select::score::Candidates;
use crate::select::{Forced, Pick, Rule, Source, Unpack, pick, rows_of};
use crate::simd::{Kernel, Simd};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, check_count, planned, sparse};

sparse! {
    /// Sparsifiner: a low-rank attention says which keys each token of an image sees.
    ///
    /// ```text
    /// q' = q Wq + bq,  k' = k Wk + bk              into a few channels, all heads alike
    /// C  = softmax(s q' (k'^T Pn))                 over r directions
    /// S  = C' |Pb|'^T                              where ' keeps the 8 largest of a row of
    ///                                              C, and what is above a threshold of |Pb|
    /// a token sees the keys of the B = ceil(rate N) largest entries of its row of S
    /// ```
    ///
    /// and the class token all. From "Sparsifiner: Learning Sparse Instance-Dependent
    /// Attention for Efficient Vision Transformers" (arXiv 2303.13755); `s` is `1 /
    /// sqrt(heads)`, as its code has it, where others would count channels. `Pn` and
    /// `Pb` are learned for one number of tokens. Equal entries go to the lower key:
    /// where all of a row are 0, to the first ones. Self-attention, not causal.
    ///
    /// The tokens of an image are there at once, with nothing to be cached: it runs
    /// over arrays.
    ///
    /// Cost: for each head `4 N head_dim c + 4 N c r` flops and `16 N^2` for `S`; `2
    /// (head_dim + value_dim)` a selected pair.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::Sparsifiner};
    /// use ndarray::{Array2, Array4};
    ///
    /// let x = Array4::from_shape_fn((1, 2, 197, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let weights = Array2::from_shape_fn((17, 8), |(i, j)| ((i * 8 + j) as f32).sin());
    /// let basis = Array2::from_shape_fn((197, 24), |(i, j)| ((i * 24 + j) as f32).cos());
    /// let sparsifiner = Sparsifiner::builder([weights.clone(), weights], [basis.clone(), basis]).build()?;
    /// let out = sparsifiner.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Sparsifiner;
    /// Builds a [`Sparsifiner`].
    SparsifinerBuilder, never causal;
    given {
        weights: [Array2<f32>; 2];
        bases: [Array2<f32>; 2];
    }
    own {
        /// The share of the keys that a token sees. Default: 0.25.
        rate: f64 = 0.25;
        /// Directions of a token that count. Default: 8.
        directions: usize = 8;
        /// What entries of the basis count from. Default: 0.
        least: f32 = 0.0;
        /// Tokens at the start that see all. Default: 1.
        class: usize = 1;
        /// The factor of the low-rank products. Default: `1 / sqrt(heads)`.
        low_scale: Option<f32> = None;
    }
    check(this) {
        check_count("directions", this.directions)?;
        if this.rate.is_nan() || !(0.0..=1.0).contains(&this.rate) {
            return Err(Error::value("rate", "a share from 0 to 1", this.rate));
        }
        if let Some(scale) = this.low_scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("low_scale", "a finite number", scale));
        }
        for (name, [x, y]) in [("weights", &this.weights), ("bases", &this.bases)] {
            if x.dim() != y.dim() {
                return Err(Error::shape(name, format!("both of one shape, {:?}", x.shape()), y.shape()));
            }
        }
        Ok(())
    }
}

room! {
    /// What a thread works in.
    Scratch<'a>(d: usize, c: usize, n: usize, r: usize) {
        keys: f32 = n.saturating_mul(c),
        queries: f32 = n.saturating_mul(c),
        directions: f32 = r.saturating_mul(c),
        entries: f32 = n,
        few: u64 = r.div_ceil(64),
        bits: u64 = n.div_ceil(64);
        project: gate::Room<'a> = (d + 1, c),
        condense: gate::Room<'a> = (n, c),
        probe: probe::Room<'a> = (c, r),
        pick: pick::Room<'a> = (n.max(r))
    }
}

/// `to += x |row|`, where entries of the row are above `least`.
struct Spread<'a> {
    x: f32,
    row: ArrayView2<'a, f32>,
    least: f32,
    to: &'a mut [f32],
}

impl Kernel for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { x, row, least, to } = self;
        let add = |to: &mut f32, entry: f32| *to += x * if entry.abs() > least { entry.abs() } else { 0.0 };
        match row.as_slice() {
            Some(row) => to.iter_mut().zip(row).for_each(|(to, &entry)| add(to, entry)),
            None => to.iter_mut().zip(row).for_each(|(to, &entry)| add(to, entry)),
        }
    }
}

impl Sparsifiner {
    /// With weights of queries and of keys, `[head_dim + 1, channels]` with the
    /// offsets last, and the bases `Pn` and `Pb`, `[tokens, directions]`.
    pub fn builder(weights: [Array2<f32>; 2], [condense, spread]: [Array2<f32>; 2]) -> SparsifinerBuilder {
        // Directions are read one by one.
        let turned = |x: Array2<f32>| x.t().as_standard_layout().into_owned().reversed_axes();
        SparsifinerBuilder::with(weights, [turned(condense), turned(spread)])
    }

    /// Channels, tokens and directions, of a call that fits.
    fn sizes(&self, dims: &Dims, mut sequences: impl Iterator<Item = Sequence>) -> Result<[usize; 3]> {
        let ((rows, c), (n, r)) = (self.weights[0].dim(), self.bases[0].dim());
        if dims.head_dim.checked_add(1) != Some(rows) {
            let expected = format!("[head_dim + 1, channels] for a head_dim of {}", dims.head_dim);
            return Err(Error::shape("weights", expected, self.weights[0].shape()));
        }
        if let Some(of) = sequences.find(|of| [of.queries.len(), of.keys.len()] != [n; 2]) {
            let got = format_args!("{} queries and {} keys", of.queries.len(), of.keys.len()).to_string();
            return Err(Error::value("q", format!("the {n} tokens that the bases are for"), got));
        }
        Ok([c, n, r])
    }

    fn low_scale(&self, dims: &Dims) -> f32 {
        self.low_scale.unwrap_or(1.0 / (dims.q_heads.max(1) as f32).sqrt())
    }

    /// What is chosen of the directions, and of the keys.
    fn picks(&self, n: usize) -> [Pick; 2] {
        let pick = |k| Pick { rule: Rule::TopK(k), forced: Forced::default() };
        [pick(self.directions), pick((self.rate * n as f64).ceil() as usize)]
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Result<(Search<'a>, [usize; 3])> {
        let sizes = self.sizes(&source.dims, (0..source.dims.batch).map(|i| source.sequence(i)))?;
        let [c, n, r] = sizes;
        let share = Scratch::bytes(source.dims.head_dim, c, n, r);
        Ok((Search { source, layout: source.layout_per(Per::Head, 1), unit: 1, share }, sizes))
    }
}

impl Planned for Sparsifiner {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source)?.0.bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists> {
        let (search, [c, n, r]) = self.search(source)?;
        let (isa, d, scale) = (source.isa, source.dims.head_dim, self.low_scale(&source.dims));
        let [condense, spread] = &self.bases;
        let found = search.by_head(
            workspace,
            |arena| Scratch::take(arena, d, c, n, r),
            |room, place, lists| {
                let rows =
                    [source.queries(place.of, place.head), source.rows_of_keys(place.of, place.kv_head)];
                for ((rows, weights), to) in
                    rows.iter().zip(&self.weights).zip([&mut *room.queries, &mut *room.keys])
                {
                    let fill = |i: usize, row: &mut [f32]| {
                        row[d] = 1.0;
                        isa.dispatch(Unpack { from: rows.part(i..i + 1), to: &mut row[..d] });
                    };
                    Gate { isa, weights: weights.view(), norm: None, theta: None }.rows(
                        n,
                        fill,
                        |_| 0,
                        &mut room.project,
                        to,
                    );
                }
                if let Ok(keys) = ArrayView2::from_shape((n, c), &*room.keys) {
                    let fill = |i: usize, row: &mut [f32]| {
                        row.iter_mut().zip(condense.column(i)).for_each(|(to, &x)| *to = x);
                    };
                    Gate { isa, weights: keys, norm: None, theta: None }.rows(
                        r,
                        fill,
                        |_| 0,
                        &mut room.condense,
                        room.directions,
                    );
                }
                let probe = Probe { isa, queries: rows_of(room.queries, n, c), scale };
                let directions = |r| Candidates::Rows(rows_of(room.directions, r, c));
                let [few, most] = self.picks(n);
                probe.run(
                    |_| r,
                    directions,
                    &mut room.probe,
                    |i, row| {
                        if i < self.class {
                            lists.extend(0..n as u32);
                        } else {
                            pick::choose(isa, &few, row, &mut room.pick, room.few);
                            room.entries.fill(0.0);
                            for b in ones(room.few) {
                                let basis = spread.slice(ndarray::s![.., b..b + 1]).reversed_axes();
                                isa.dispatch(Spread {
                                    x: row[b],
                                    row: basis,
                                    least: self.least,
                                    to: room.entries,
                                });
                            }
                            pick::choose(isa, &most, room.entries, &mut room.pick, room.bits);
                            lists.extend(ones(room.bits).map(|j| j as u32));
                        }
                        lists.end();
                    },
                );
            },
        )?;
        found.tokens()
    }

    fn define_plan(&self, x: &Exact) -> Result<(TokenLists, Margins)> {
        let [_, n, _] = self.sizes(&x.dims, x.sequences.iter().cloned())?;
        let scale = f64::from(self.low_scale(&x.dims));
        let [wq, wk] = self.weights.each_ref().map(|w| w.mapv(f64::from));
        let [condense, spread] = self.bases.each_ref().map(|b| b.mapv(f64::from));
        let basis = spread.mapv(|x| if x.abs() > f64::from(self.least) { x.abs() } else { 0.0 });
        let low = |x: ArrayView2<'_, f64>, w: &Array2<f64>| {
            let (linear, offset) = w.view().split_at(Axis(0), w.nrows() - 1);
            x.dot(&linear) + offset
        };
        let [few, most] = self.picks(n);
        x.plan((Per::Head, 1), 1, |of, head| {
            let (q, k) = (low(x.q(of, head), &wq), low(x.k(of, head), &wk));
            let logits = q.dot(&k.t().dot(&condense)) * scale;
            let row = |i: usize| {
                if i < self.class {
                    return [(0..n).collect(), Vec::new()];
                }
                let shares = weights(logits.row(i).to_vec());
                let (ids, doubt) = chosen(&few, &shares);
                let entry = |j: usize| ids.iter().map(|&b| shares[b] * basis[[j, b]]).sum();
                let (list, near) = chosen(&most, &(0..n).map(entry).collect::<Vec<f64>>());
                let kept = doubt.iter().filter(|b| ids.contains(b)).count();
                // With another direction all entries are others.
                let unsure = 0 < kept && kept < doubt.len();
                [list, if unsure { (0..n).collect() } else { near }]
            };
            (0..n).map(row).collect()
        })
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let ((rows, c), (n, r)) = (self.weights[0].dim(), self.bases[0].dim());
        let each =
            4 * (n * c) as u64 * (rows + r) as u64 + 2 * (self.directions.min(r) * n) as u64 * n as u64;
        (source.dims.batch * source.dims.q_heads) as u64 * each
    }
}

planned!(Sparsifiner, TokenLists);

exhibit! {
    SparsifinerExhibit of Sparsifiner, "sparse", "Sparsifiner", "arXiv 2303.13755";
    "the quarter of the tokens of an image that a low-rank attention points at; the class token sees all";
    not "for other numbers of tokens than its bases are for";
    tokens true;
    build(x, field) {
        let (_, _, n, d) = x.q.dim();
        let array = |which, rows, cols| Array2::from_shape_fn((rows, cols), |(i, j)| field.at(which, 0, i, j));
        let weights = [1, 2].map(|which| array(which, d + 1, (d / 2).max(1)));
        let bases = [3, 4].map(|which| array(which, n, (n / 8).max(1)));
        Sparsifiner::builder(weights, bases).least(0.1)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Sparsifiner, SparsifinerExhibit);

#[cfg(test)]
mod tests;
