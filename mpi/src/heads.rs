//! Heads over machines: tokens are exchanged for heads, each rank works on whole sequences
//! of some heads, and outputs go back.
//!
//! "DeepSpeed Ulysses" (arXiv 2309.14509). Rank `r` has query heads `q_heads r / ranks` to
//! `q_heads (r + 1) / ranks`, and the key/value heads that these read: where there are fewer
//! of those than ranks, they go to several. Two all-to-alls; a rank sends `held` rows of
//! each head that another one has, and as many back. Backwards it is the same with the
//! gradients, of which those of keys and values that went to several ranks are added up in
//! the order of ranks.
//!
//! Any mechanism whose heads know nothing of each other will do, with any mask: it is called
//! with one key/value head at a time.

use std::ops::Range;

use attention_kernels::dense::SoftmaxGradients;
use attention_kernels::{Attention, Backward, Qkv};
use ndarray::{Array4, ArrayView4, s};

use crate::error::Result;
use crate::plan::{Cut, part};
use crate::ring::same;
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// The query heads of a rank, and the key/value heads that they read.
///
/// ```
/// use attention_kernels_mpi::heads::share;
///
/// assert_eq!(share(8, 2, 4, 1), (2..4, 0..1));
/// assert_eq!(share(6, 2, 4, 2), (3..4, 1..2));
/// ```
pub fn share(q_heads: usize, kv_heads: usize, ranks: usize, rank: usize) -> (Range<usize>, Range<usize>) {
    let (q, group) = (part(q_heads, ranks, rank), (q_heads / kv_heads.max(1)).max(1));
    let kv = if q.is_empty() { 0..0 } else { q.start / group..(q.end - 1) / group + 1 };
    (q, kv)
}

/// Outputs `[batch, q_heads, held, value_dim]` of this rank's tokens, before they are
/// rounded to the type of the input.
///
/// # Errors
/// The same on all ranks: the lowest one whose arrays do not fit, or whose mechanism refuses.
pub fn forward<T, M>(
    group: &Group,
    mechanism: &M,
    cut: &Cut,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
) -> Result<Array4<f32>>
where
    T: Stored,
    M: for<'a> Attention<Qkv<'a, T, T, f32>>,
{
    const CALL: &str = "heads forward";
    agree(group, CALL, cut, [&q, &k, &v], None)?;
    let shares = Shares::new(group, cut, [&q, &k, &v]);
    let (arrived, _) = shares.exchange([&q, &k, &v], None);
    let mut said = Ok(());
    let mut out = shares.zeros(shares.mine().0.len(), v.dim().3);
    for (of, x) in shares.each(&arrived) {
        match mechanism.forward(x.widened()) {
            Ok(part) => out.slice_mut(s![.., of, .., ..]).assign(&part),
            Err(error) => said = Err(error.to_string()),
        }
    }
    let back = shares.home(&[&out]);
    let mut all = Array4::zeros((q.dim().0, q.dim().1, q.dim().2, v.dim().3));
    for (rank, mut bytes) in back.iter().map(Vec::as_slice).enumerate() {
        shares.add(&mut bytes, shares.of(rank).0, &mut all);
    }
    group.close(CALL, said.map(|()| all))
}

/// Gradients of this rank's queries, keys and values, given that of its outputs. The forward
/// pass of the heads of each rank is made once more.
///
/// # Errors
/// As [`forward`], and for a gradient of another shape.
pub fn backward<T, M>(
    group: &Group,
    mechanism: &M,
    cut: &Cut,
    (q, k, v): (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>),
    d_out: ArrayView4<'_, f32>,
) -> Result<SoftmaxGradients>
where
    T: Stored,
    M: for<'a> Backward<Qkv<'a, T, T, f32>, Gradients<f32> = SoftmaxGradients>,
{
    const CALL: &str = "heads backward";
    agree(group, CALL, cut, [&q, &k, &v], Some(&d_out))?;
    let shares = Shares::new(group, cut, [&q, &k, &v]);
    let (arrived, d_out) = shares.exchange([&q, &k, &v], Some(&d_out));
    let (of_q, of_kv) = shares.mine();
    let mut said = Ok(());
    let mut d_q = shares.zeros(of_q.len(), q.dim().3);
    let mut d_k = shares.zeros(of_kv.len(), k.dim().3);
    let mut d_v = shares.zeros(of_kv.len(), v.dim().3);
    for (at, (of, x)) in shares.each(&arrived).enumerate() {
        let d_out = d_out.slice(s![.., of.clone(), .., ..]);
        match mechanism.backward(x.widened(), d_out, Default::default()) {
            Ok(got) => {
                d_q.slice_mut(s![.., of, .., ..]).assign(&got.q);
                d_k.slice_mut(s![.., at..at + 1, .., ..]).assign(&got.k);
                d_v.slice_mut(s![.., at..at + 1, .., ..]).assign(&got.v);
            }
            Err(error) => said = Err(error.to_string()),
        }
    }
    let back = shares.home(&[&d_q, &d_k, &d_v]);
    let [mut d_q, mut d_k, mut d_v] = [q.dim(), k.dim(), v.dim()].map(Array4::zeros);
    for (rank, mut bytes) in back.iter().map(Vec::as_slice).enumerate() {
        let (of_q, of_kv) = shares.of(rank);
        shares.add(&mut bytes, of_q, &mut d_q);
        shares.add(&mut bytes, of_kv.clone(), &mut d_k);
        shares.add(&mut bytes, of_kv, &mut d_v);
    }
    group.close(CALL, said.map(|()| SoftmaxGradients::new(d_q, d_k, d_v)))
}

/// Who has which heads, and which tokens.
struct Shares<'a> {
    group: &'a Group,
    cut: &'a Cut,
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
}

impl<'a> Shares<'a> {
    fn new<T>(group: &'a Group, cut: &'a Cut, [q, _, v]: [&ArrayView4<'_, T>; 3]) -> Self {
        let ((batch, q_heads, _, head_dim), (_, kv_heads, _, value_dim)) = (q.dim(), v.dim());
        Self { group, cut, batch, q_heads, kv_heads, head_dim, value_dim }
    }

    fn of(&self, rank: usize) -> (Range<usize>, Range<usize>) {
        share(self.q_heads, self.kv_heads, self.group.size(), rank)
    }

    fn mine(&self) -> (Range<usize>, Range<usize>) {
        self.of(self.group.rank())
    }

    /// Of all tokens.
    fn zeros(&self, heads: usize, dim: usize) -> Array4<f32> {
        Array4::zeros((self.batch, heads, self.cut.tokens(), dim))
    }

    /// Queries, keys and values of this rank's heads, and gradients of outputs where there are
    /// some, in the order of the sequence.
    fn exchange<T: Stored>(
        &self,
        [q, k, v]: [&ArrayView4<'_, T>; 3],
        d_out: Option<&ArrayView4<'_, f32>>,
    ) -> ([Array4<T>; 3], Array4<f32>) {
        let packed = |rank| {
            let (of_q, of_kv) = self.of(rank);
            let mut bytes = Vec::new();
            pack(q.slice(s![.., of_q.clone(), .., ..]), &mut bytes);
            pack(k.slice(s![.., of_kv.clone(), .., ..]), &mut bytes);
            pack(v.slice(s![.., of_kv, .., ..]), &mut bytes);
            if let Some(d_out) = d_out {
                pack(d_out.slice(s![.., of_q, .., ..]), &mut bytes);
            }
            bytes
        };
        let packed: Vec<Vec<u8>> = (0..self.group.size()).map(packed).collect();
        let (of_q, of_kv) = self.mine();
        let rows = of_q.len() * self.head_dim + of_kv.len() * (self.head_dim + self.value_dim);
        let gradients = if d_out.is_some() { size_of::<f32>() * of_q.len() * self.value_dim } else { 0 };
        let token = self.batch * (rows * size_of::<T>() + gradients);
        let lengths: Vec<_> = (0..self.group.size()).map(|rank| self.cut.held(rank) * token).collect();
        let arrived = self.group.exchange(&slices(&packed), &lengths);
        let mut from = slices(&arrived);
        let q = self.whole(&mut from, of_q.len(), self.head_dim);
        let k = self.whole(&mut from, of_kv.len(), self.head_dim);
        let v = self.whole(&mut from, of_kv.len(), self.value_dim);
        let width = if d_out.is_some() { self.value_dim } else { 0 };
        ([q, k, v], self.whole(&mut from, of_q.len(), width))
    }

    /// Rows of all ranks.
    fn whole<T: Stored>(&self, from: &mut [&[u8]], heads: usize, dim: usize) -> Array4<T> {
        let mut all = Array4::from_elem((self.batch, heads, self.cut.tokens(), dim), T::default());
        for (rank, bytes) in from.iter_mut().enumerate() {
            let part: Array4<T> = unpack(bytes, (self.batch, heads, self.cut.held(rank), dim));
            let mut row = 0;
            for run in self.cut.runs(rank) {
                let rows = row..row + run.len();
                row = rows.end;
                all.slice_mut(s![.., .., run.clone(), ..]).assign(&part.slice(s![.., .., rows, ..]));
            }
        }
        all
    }

    /// For each of this rank's key/value heads which query heads of its own read it, and all
    /// of their rows.
    fn each<'x, T: Stored>(
        &self,
        [q, k, v]: &'x [Array4<T>; 3],
    ) -> impl Iterator<Item = (Range<usize>, Qkv<'x, T>)> {
        let (of_q, of_kv) = self.mine();
        let per = (self.q_heads / self.kv_heads.max(1)).max(1);
        let first = of_kv.start;
        of_kv.map(move |kv| {
            let of = (kv * per).max(of_q.start) - of_q.start..((kv + 1) * per).min(of_q.end) - of_q.start;
            let at = kv - first..kv - first + 1;
            let x = Qkv::new(
                q.slice(s![.., of.clone(), .., ..]),
                k.slice(s![.., at.clone(), .., ..]),
                v.slice(s![.., at, .., ..]),
            );
            (of, x)
        })
    }

    /// Sends each rank its tokens' rows of this rank's heads, and gets those of others.
    fn home(&self, arrays: &[&Array4<f32>]) -> Vec<Vec<u8>> {
        let packed = |rank| {
            let mut bytes = Vec::new();
            for all in arrays {
                for run in self.cut.runs(rank) {
                    pack(all.slice(s![.., .., run.clone(), ..]), &mut bytes);
                }
            }
            bytes
        };
        let packed: Vec<Vec<u8>> = (0..self.group.size()).map(packed).collect();
        let held = self.batch * self.cut.held(self.group.rank()) * size_of::<f32>();
        let length = |rank| {
            let (of_q, of_kv) = self.of(rank);
            held * match arrays {
                [_] => of_q.len() * self.value_dim,
                _ => of_q.len() * self.head_dim + of_kv.len() * (self.head_dim + self.value_dim),
            }
        };
        let lengths: Vec<_> = (0..self.group.size()).map(length).collect();
        self.group.exchange(&slices(&packed), &lengths)
    }

    /// Adds rows of another rank's heads to those of this rank's tokens.
    fn add(&self, bytes: &mut &[u8], heads: Range<usize>, to: &mut Array4<f32>) {
        let (batch, .., dim) = to.dim();
        let mut row = 0;
        for run in self.cut.runs(self.group.rank()) {
            let rows = row..row + run.len();
            row = rows.end;
            let mut to = to.slice_mut(s![.., heads.clone(), rows, ..]);
            to += &unpack::<f32, _>(bytes, (batch, heads.len(), run.len(), dim));
        }
    }
}

fn slices(packed: &[Vec<u8>]) -> Vec<&[u8]> {
    packed.iter().map(Vec::as_slice).collect()
}

/// Whether all ranks are at the same call with arrays that go together.
fn agree<T: Stored>(
    group: &Group,
    call: &'static str,
    cut: &Cut,
    [q, k, v]: [&ArrayView4<'_, T>; 3],
    d_out: Option<&ArrayView4<'_, f32>>,
) -> Result<()> {
    let mine = check(group, cut, q, k, v).and_then(|()| {
        let expected = (q.dim().0, q.dim().1, q.dim().2, v.dim().3);
        if let Some(d_out) = d_out.filter(|d_out| d_out.dim() != expected) {
            return Err(format!("d_out: expected shape {expected:?}, got {:?}", d_out.dim()));
        }
        let sizes = [q.dim().0, q.dim().1, k.dim().1, k.dim().3, v.dim().3];
        let rest = [T::ROUNDING.to_bits(), cut.fingerprint()];
        Ok(sizes.map(|x| x as u64).into_iter().chain(rest).collect())
    });
    const NAMES: [&str; 7] =
        ["q: batch", "q: heads", "k: heads", "k: head_dim", "v: value_dim", "q: type", "cut: fingerprint"];
    same(&group.agree(call, mine)?, &NAMES)
}

fn check<T: Stored>(
    group: &Group,
    cut: &Cut,
    q: &ArrayView4<'_, T>,
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
) -> Result<(), String> {
    if cut.ranks() != group.size() {
        return Err(format!("cut: expected one for {} ranks, got {}", group.size(), cut.ranks()));
    }
    let held = cut.held(group.rank());
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        if x.dim().2 != held {
            return Err(format!("{name}: expected len {held} as the cut has it, got {:?}", x.shape()));
        }
    }
    Qkv::new(q.view(), k.view(), v.view()).dims().map(|_| ()).map_err(|error| error.to_string())
}
