//! MesaNet: queries read the linear map that fits all tokens so far best, by least
//! squares.

use ndarray::{Array2, ArrayView2};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate};
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::state::State;
use crate::input::tokens::Tokens;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::delta_rule::unit;
use crate::stages::options::{Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::{Config, check_channels};
use crate::stages::solve::{self, Systems};
use crate::stages::{linear, slots};

input! {
    /// Queries, keys and values with a log decay and a weight of each token: what
    /// [`MesaNet`] takes.
    MesaQkv(qkv) {
        /// Natural logarithms of what a token leaves of the state: at most 0,
        /// `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len],
        /// What a token weighs: at least 0.
        beta: f32 [batch, heads/, len],
    }
}

/// What [`MesaNet`] carries from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct MesaState {
    pub(crate) keys: State,
    pub(crate) values: State,
}

impl MesaState {
    /// A state of these parts, for instance one that was saved: `H`, symmetric,
    /// `[sequences, heads, head_dim, head_dim]`, and `G`, `[sequences, heads, head_dim,
    /// value_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for matrices of other sequences, heads or sizes.
    pub fn new(keys: State, values: State) -> Result<Self> {
        let (sequences, heads, dim, _) = values.view().dim();
        keys.check((sequences, heads, dim, dim))?;
        Ok(Self { keys, values })
    }

    /// `H`, `[sequences, heads, head_dim, head_dim]`.
    pub fn keys(&self) -> &State {
        &self.keys
    }

    /// `G`, `[sequences, heads, head_dim, value_dim]`.
    pub fn values(&self) -> &State {
        &self.values
    }
}

/// MesaNet: queries read the linear map that fits all tokens so far best, by least
/// squares.
///
/// ```text
/// H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T
/// G_t = exp(g_t) G_{t-1} + beta_t k_t v_t^T
/// o_t = scale * G_t^T (H_t + diag(ridge))^-1 q_t
/// ```
///
/// "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training" (arXiv
/// 2506.05233). `G^T (H + ridge)^-1` is the matrix `W` of least `sum_j w_j |v_j - W
/// k_j|^2 + ridge |W|^2`, where `w_j` are weights that decay: a recurrence that
/// corrects itself for each token at once, where
/// [`GatedDeltaNet`](crate::linear::GatedDeltaNet) makes a step towards it. Models divide
/// queries and keys by their norms, and learn the ridge as `softplus(x) + 0.25`.
///
/// The definition solves each token's system by elimination. The kernel makes at
/// most [`steps`](MesaNetBuilder::steps) of conjugate gradients, 30 as the published code
/// does, which adds `1e-5` to what it divides by, and this does not; it stops where the
/// residual is `1e-7` of the query. Where that many do not get there, what is left is in the
/// error bound. Outputs are then read from `G` in chunks.
///
/// Cost: about `2 head_dim^2` flops a step, token and head, and then as
/// [`SimpleGla`](crate::linear::SimpleGla). The systems of a head are one thread's work.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{MesaNet, MesaQkv}};
/// use ndarray::{Array2, Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let (decay, beta) = (Array3::from_elem((1, 2, 100), -0.01), Array3::from_elem((1, 2, 100), 0.5));
/// let ridge = Array2::from_elem((2, 32), 0.5); // [heads, head_dim]
///
/// let mesa = MesaNet::builder(ridge.view()).normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = mesa.forward(MesaQkv::new(qkv, decay.view(), beta.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MesaNet {
    config: Config,
    ridge: Array2<f32>,
    normalize: bool,
    steps: usize,
}

impl MesaNet {
    /// With what is added to diagonals, `[heads, head_dim]`, above 0. Queries and keys as
    /// they are.
    pub fn builder(ridge: ArrayView2<'_, f32>) -> MesaNetBuilder {
        MesaNetBuilder::with(ridge.as_standard_layout().into_owned())
    }
}

const ABOVE: Range =
    Range::new(["a finite number above 0", "finite numbers above 0"], |x| x.is_finite() && x > 0.0);

options! {
    /// Builds a [`MesaNet`].
    MesaNetBuilder of MesaNet, form growth scale "1";
    given { ridge: Array2<f32>, in ABOVE; }
    own { steps: usize = 30; }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        if this.steps == 0 {
            return Err(Error::value("steps", "at least 1", 0));
        }
        Ok(MesaNet { config, ridge: this.ridge, normalize: this.normalize_qk, steps: this.steps })
    }
}

impl MesaNetBuilder {
    /// The most steps of conjugate gradients of a token, of at least 1. As many as
    /// `head_dim` nearly always do. Default: 30.
    pub fn steps(self, steps: usize) -> Self {
        Self { steps, ..self }
    }
}

impl MesaNet {
    fn dims<T: Element>(&self, x: &MesaQkv<'_, T>, state: Option<&MesaState>) -> Result<Dims> {
        let dims = x.token_dims()?;
        self.config.check_decays("log_decay", x.log_decay)?;
        if let Some(beta) = x.beta.iter().find(|&&beta| beta < 0.0) {
            return Err(Error::value("beta", "weights of at least 0", beta));
        }
        check_channels("ridge", self.ridge.dim(), &dims)?;
        if let Some(state) = state {
            state.keys.check((dims.batch, dims.q_heads, dims.head_dim, dims.head_dim))?;
            state.values.check((dims.batch, dims.q_heads, dims.head_dim, dims.value_dim))?;
        }
        Ok(dims)
    }

    fn empty<T: Element>(&self, x: &MesaQkv<'_, T>) -> Result<MesaState> {
        let Dims { batch, q_heads, head_dim, value_dim, .. } = self.dims(x, None)?;
        let zeros = |dim| State::zeros((batch, q_heads, head_dim, dim));
        Ok(MesaState { keys: zeros(head_dim)?, values: zeros(value_dim)? })
    }
}

impl<T: Element> Pipeline<MesaQkv<'_, T>> for MesaNet {
    type State = MesaState;

    fn flow(
        &self,
        x: MesaQkv<'_, T>,
        mut state: Option<&mut MesaState>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.dims(&x, state.as_deref())?;
        let (batch, heads) = (if dims.packed { 1 } else { dims.batch }, dims.q_heads);
        let decay = Gate::Token(x.log_decay.reborrow());
        let arrays = Arrays { decay, ..Arrays::new(&x.qkv, heads) };
        let spec = self.config.spec(dims, x.qkv.lengths, &arrays).checked()?;
        // Both states are checked before anything is written.
        State::countable((dims.batch, heads, dims.head_dim, dims.head_dim))?;
        let rows = (batch, heads, dims.q_len, dims.head_dim);
        let (mut solved, mut keys) = (pass.rows(rows)?, pass.rows(rows)?);
        let systems = Systems {
            q: arrays.q,
            k: arrays.k,
            decay: x.log_decay,
            beta: x.beta,
            ridge: self.ridge.as_slice().unwrap_or_default(),
            normalize: self.normalize,
            steps: self.steps,
            dims,
            lengths: x.qkv.lengths,
        };
        let kept = state.as_deref_mut().map(|state| state.keys.as_mut_slice());
        solve::solutions(pass, self.config.isa, &systems, kept, [&mut solved, &mut keys]);
        let [q, k] = [&solved, &keys].map(|rows| AnyArray::F32(Heads::new(rows.view())));
        let source = Arrays { q, k, ..arrays };
        linear::run(pass, &spec, &source, state.map(|state| state.values.as_mut_slice()), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: MesaQkv<'_, T>, state: Option<&MesaState>) -> Result<Defined<R, MesaState>> {
        let dims = self.dims(&x, state)?;
        let mut state = state.map_or_else(|| self.empty(&x), |state| Ok(state.clone()))?;
        let scale = R::rounded(self.config.scale(&dims), 1.0);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let at = ndarray::s![head.sequence, head.head, .., ..];
            let ridge: Vec<f64> = self.ridge.row(head.head).iter().map(|&x| f64::from(x)).collect();
            let mut h = state.keys.view().slice(at).mapv(f64::from);
            let mut g = state.values.view().slice(at).map(|&x| R::of(f64::from(x)));
            let rows = |x| head.rows::<f64, T>(x, &head.keys);
            let (q, k, v) = (rows(&x.qkv.q), rows(&x.qkv.k), head.rows::<R, T>(&x.qkv.v, &head.keys));
            let number = |x: &ndarray::ArrayView3<'_, f32>, t: usize| {
                f64::from(x[[head.batch, head.of(x.dim().1), head.keys.start + t]])
            };
            let mut sum = h.iter().map(|x| x * x).sum::<f64>().sqrt();
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for t in 0..q.dim().0 {
                let (mut q, mut k) = (q.row(t).to_vec(), k.row(t).to_vec());
                if self.normalize {
                    [&mut q, &mut k].into_iter().for_each(|x| unit(x));
                }
                let (log_decay, beta) = (number(&x.log_decay, t), number(&x.beta, t));
                let left = slots::left(R::of(log_decay));
                for ((d, c), h) in h.indexed_iter_mut() {
                    *h = *h * log_decay.exp() + beta * k[d] * k[c];
                }
                sum = sum * log_decay.exp() + beta * k.iter().map(|x| x * x).sum::<f64>();
                for ((d, c), g) in g.indexed_iter_mut() {
                    *g = (*g * left).term(R::rounded(beta * k[d], 32.0), v[[t, c]]).summed(1);
                }
                let (solved, off) = solve::define(&h, &ridge, &q, [sum, (t + 1) as f64, self.steps as f64]);
                // Nothing, which a kernel may have that far off.
                let off = R::rounded(1.0, off * 2f64.powi(24)) - R::of(1.0);
                let solved: Vec<R> = solved.into_iter().map(|x| R::of(x) + off).collect();
                for (c, out) in out.row_mut(t).iter_mut().enumerate() {
                    *out = scale * R::dot(solved.iter().copied().zip(g.column(c).iter().copied()));
                }
            }
            state.keys.view_mut().slice_mut(at).assign(&h.mapv(|x| x as f32));
            state.values.view_mut().slice_mut(at).assign(&g.map(|x| x.value() as f32));
            out
        });
        Ok((out, state))
    }

    fn parameters(&self) -> usize {
        size_of::<f32>() * self.ridge.len()
    }
}

composite!(MesaNet, MesaQkv, state MesaState);

exhibit! {
    MesaNetExhibit of MesaNet, "linear", "MesaNet", "arXiv 2506.05233";
    "the linear map that fits all tokens so far best, which each query solves a system for";
    not "where a correction for each token will do: Gated DeltaNet costs a thirtieth";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1.max(x.v.dim().1);
        let ridge = Array2::from_shape_fn((heads, x.q.dim().3), |(h, c)| 0.25 + share(field.at(5, h, 0, c)));
        let builder = MesaNet::builder(ridge.view());
        match field.variant {
            0 => builder.normalize_qk(),
            1 => builder,
            _ => builder.steps(7).scale(0.3),
        }
    }
    extras(x, field) {
        Extras { decays: field.token_decays(x), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> MesaQkv<'a, T> {
        MesaQkv::new(x, extras.decays.view(), extras.betas.view())
    }
}
carded!(MesaNet, MesaNetExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{SimpleGla, TokenGated};
    use crate::testing::{GATES, Gates, array, keeps, pairs};
    use crate::{Attention, Recurrent};
    use ndarray::{Array3, Array4};

    /// `H` where values are keys: `H (H + r)^-1 q` and `r (H + r)^-1 q` are the query.
    #[test]
    fn definition_solves_the_system_of_all_pairs() {
        let (q, k) = (array([1, 2, 50, 6], 1), array([1, 1, 50, 6], 2));
        let beta = Array3::from_shape_fn((1, 2, 50), |(_, h, t)| ((h + t) as f32).sin().abs());
        let mesa = MesaNet::builder(Array2::from_elem((2, 6), 0.5).view()).build().unwrap();
        let keys = Array4::from_shape_fn((1, 2, 50, 6), |(b, _, t, c)| k[[b, 0, t, c]]);
        for gates in GATES {
            let g = gates.tokens([1, 2, 50], 3);
            let x = MesaQkv::new(Qkv::new(q.view(), k.view(), k.view()), g.view(), beta.view());
            let read = mesa.reference(x).unwrap();
            let again = pairs(&keys, |b, h, i, j| {
                let solved = |c| (f64::from(q[[b, h, i, c]]) - read[[b, h, i, c]]) / 0.5;
                let dot: f64 = (0..6).map(|c| f64::from(k[[b, 0, j, c]]) * solved(c)).sum();
                let decay: f64 = (j + 1..=i).map(|t| f64::from(g[[b, h, t]])).sum();
                decay.exp() * f64::from(beta[[b, h, j]]) * dot
            });
            assert!(read.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-9), "{gates:?}");
        }
    }

    #[test]
    fn a_large_ridge_leaves_linear_attention() {
        let (q, k, v) = (array([1, 2, 70, 8], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 5], 3));
        let (g, beta) = (Gates::Mild.tokens([1, 2, 70], 4), Array3::from_elem((1, 2, 70), 1.0));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let mesa = MesaNet::builder(Array2::from_elem((2, 8), 1e6).view()).scale(1e6).build().unwrap();
        let got = mesa.forward(MesaQkv::new(qkv, g.view(), beta.view())).unwrap();
        let linear = SimpleGla::builder().scale(1.0).build().unwrap();
        let want = linear.reference(TokenGated::new(qkv, g.view())).unwrap();
        assert!(got.iter().zip(&want).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-4));
    }

    /// Gates of one head are those of all.
    #[test]
    fn heads_share_gates() {
        let (q, k, v) = (array([2, 4, 70, 8], 1), array([2, 2, 70, 8], 2), array([2, 2, 70, 5], 3));
        let (g, beta) = (Gates::Mild.tokens([2, 2, 70], 4), Gates::Mild.tokens([2, 1, 70], 5).mapv(f32::abs));
        let of_all = |x: &Array3<f32>| {
            let share = 4 / x.dim().1;
            Array3::from_shape_fn((2, 4, 70), |(b, h, t)| x[[b, h / share, t]])
        };
        let mesa = MesaNet::builder(Array2::from_elem((4, 8), 0.5).view()).build().unwrap();
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let (each_g, each_beta) = (of_all(&g), of_all(&beta));
        let (few, all) =
            (MesaQkv::new(qkv, g.view(), beta.view()), MesaQkv::new(qkv, each_g.view(), each_beta.view()));
        assert_eq!(mesa.forward(few).unwrap(), mesa.forward(all).unwrap());
        assert_eq!(mesa.reference(few).unwrap(), mesa.reference(all).unwrap());
    }

    #[test]
    fn orthonormal_keys_give_their_values_back() {
        let k = Array4::from_shape_fn((1, 1, 16, 16), |(_, _, t, c)| f32::from(u8::from(t == c)));
        // The last query asks for each key in turn, by steps of one token.
        let v = array([1, 1, 16, 7], 3);
        let (g, beta) = (Array3::zeros((1, 1, 16)), Array3::from_elem((1, 1, 16), 1.0));
        let mesa = MesaNet::builder(Array2::from_elem((1, 16), 1e-3).view()).build().unwrap();
        let input =
            |q| MesaQkv::new(Qkv { q, ..Qkv::new(k.view(), k.view(), v.view()) }, g.view(), beta.view());
        let mut state = mesa.initial_state(input(k.view())).unwrap();
        mesa.prefill(input(k.view()), &mut state).unwrap();
        let none = Array3::zeros((1, 1, 16));
        let x = MesaQkv { beta: none.view(), ..input(k.view()) };
        let out = mesa.prefill(x, &mut state).unwrap();
        assert!(out.iter().zip(&v).all(|(a, b)| (a * 1.001 - b).abs() < 1e-6));
    }

    /// Whatever the condition, and however few steps.
    #[test]
    fn kernels_keep_to_the_definition() {
        let (q, k, v) = (array([1, 2, 140, 40], 1), array([1, 2, 140, 40], 2), array([1, 2, 140, 9], 3));
        let beta = Array3::from_elem((1, 2, 140), 1.0);
        for (ridge, steps) in [(0.25, 30), (1e-3, 30), (1e-3, 200), (1e3, 30), (0.25, 1)] {
            for gates in [Gates::Zero, Gates::Cut] {
                let g = gates.tokens([1, 2, 140], 4);
                let builder = MesaNet::builder(Array2::from_elem((2, 40), ridge).view());
                let mesa = builder.steps(steps).build().unwrap();
                let x = MesaQkv::new(Qkv::new(q.view(), k.view(), v.view()), g.view(), beta.view());
                let share = keeps("mesa", &mesa, x);
                println!("ridge {ridge}, {steps} steps, {gates:?}: {share:.3} of the bound");
            }
        }
    }

    #[test]
    fn refusals() {
        let x = array([1, 2, 6, 8], 1);
        let (g, beta) = (Array3::zeros((1, 2, 6)), Array3::from_elem((1, 2, 6), -0.5));
        let ridge = |dim| Array2::from_elem((2, dim), 0.5);
        let error = |result: Result<MesaNet>| result.unwrap_err().to_string();
        assert_eq!(
            error(MesaNet::builder(Array2::zeros((2, 8)).view()).build()),
            "ridge: expected finite numbers above 0, got 0"
        );
        assert_eq!(
            error(MesaNet::builder(ridge(8).view()).steps(0).build()),
            "steps: expected at least 1, got 0"
        );
        let input = MesaQkv::new(Qkv::new(x.view(), x.view(), x.view()), g.view(), beta.view());
        let mesa = MesaNet::builder(ridge(8).view()).build().unwrap();
        let error = |mesa: &MesaNet, x| mesa.forward(x).unwrap_err().to_string();
        assert_eq!(error(&mesa, input), "beta: expected weights of at least 0, got -0.5");
        let other = MesaNet::builder(ridge(7).view()).build().unwrap();
        let fine = MesaQkv { beta: g.view(), ..input };
        assert_eq!(error(&other, fine), "ridge: expected shape [heads, head_dim] = [2, 8], got [2, 7]");
        let zeros = |rows, dim| State::new(Array4::zeros((1, 2, rows, dim))).unwrap();
        assert!(MesaState::new(zeros(8, 7), zeros(8, 3)).is_err());
        let mut state = MesaState::new(zeros(7, 7), zeros(7, 8)).unwrap();
        assert!(mesa.prefill(fine, &mut state).is_err());
    }
}
