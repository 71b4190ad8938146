//! Entries of linear attention.

use ndarray::{Array3, Array4, ArrayViewMut4};

use super::{Recipe, Trial};
use crate::attention::{Attention, Cost};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::linear::Lightning;
use crate::simd::Isa;

/// A mechanism, what it takes besides queries, keys and values, and how that
/// becomes its input.
trait Case<T: Element>: Sized + Send + Sync {
    type Mechanism: Attention<T>;

    /// For inputs of these sizes. What is of the storage type of the arrays
    /// is rounded by `round` besides.
    fn new(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<Self>;

    fn mechanism(&self) -> &Self::Mechanism;

    fn input<'a>(&'a self, x: Qkv<'a, T>) -> <Self::Mechanism as Attention<T>>::Input<'a>;
}

/// Numbers that depend on a seed and on a head, a token and a channel alone:
/// the same for every sequence.
struct Field {
    seed: u64,
    /// Rounds to the storage type of the trial.
    round: fn(f32) -> f32,
}

impl Field {
    fn of<T: Element>(seed: u64) -> Self {
        Self { seed, round: |x| T::from_f32(x).to_f32() }
    }

    /// From -1 to 1.
    fn at(&self, which: u64, head: usize, token: usize, channel: usize) -> f32 {
        let mut z = self.seed;
        for part in [which, head as u64, token as u64, channel as u64] {
            z = z.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
        }
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A mechanism on an input.
struct OnTokens<'a, T, C> {
    case: C,
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
}

fn trial<'a, T: Element, C>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>>
where
    C: Case<T> + Case<f32> + 'a,
{
    let case = <C as Case<T>>::new(&x, isa, &Field::of::<T>(seed))?;
    Ok(Box::new(OnTokens { case, x, isa, seed }))
}

impl<T: Element, C: Case<T> + Case<f32>> OnTokens<'_, T, C> {
    /// Calls `run` with the mechanism and an input whose values are a unit
    /// vector for each key, in `f32`: its outputs are weights, for what all
    /// these mechanisms make of values is linear.
    fn on_unit_values<R>(
        &self,
        run: impl FnOnce(
            &<C as Case<f32>>::Mechanism,
            <<C as Case<f32>>::Mechanism as Attention<f32>>::Input<'_>,
        ) -> Result<R>,
    ) -> Result<R> {
        let (q, k) = (self.x.q.mapv(Element::to_f32), self.x.k.mapv(Element::to_f32));
        let (batch, heads, len, _) = self.x.v.dim();
        let v = Array4::from_shape_fn((batch, heads, len, len), |(_, _, j, c)| f32::from(j == c));
        let x = Qkv::new(q.view(), k.view(), v.view());
        let case = <C as Case<f32>>::new(&x, self.isa, &Field::of::<T>(self.seed))?;
        run(<C as Case<f32>>::mechanism(&case), <C as Case<f32>>::input(&case, x))
    }

    fn mechanism(&self) -> &<C as Case<T>>::Mechanism {
        <C as Case<T>>::mechanism(&self.case)
    }

    fn input(&self) -> <<C as Case<T>>::Mechanism as Attention<T>>::Input<'_> {
        <C as Case<T>>::input(&self.case, self.x.reborrow())
    }
}

impl<T: Element, C: Case<T> + Case<f32>> Trial<T> for OnTokens<'_, T, C> {
    fn forward_into(&self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        self.mechanism().forward_into(self.input(), out, workspace)
    }
    fn workspace_bytes(&self) -> Result<usize> {
        self.mechanism().workspace_bytes(self.input())
    }
    fn reference(&self) -> Result<Array4<f64>> {
        self.mechanism().reference(self.input())
    }
    fn error_bound(&self) -> Result<Array3<f64>> {
        self.mechanism().error_bound(self.input())
    }
    fn weights(&self) -> Result<Array4<f32>> {
        self.on_unit_values(|mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.on_unit_values(|mechanism, x| mechanism.reference(x))
    }
    fn cost(&self) -> Result<Cost> {
        self.mechanism().cost(self.input())
    }
}

/// A builder with the instruction set that a trial asks for.
fn on<B>(builder: B, isa: Option<Isa>, set: impl FnOnce(B, Isa) -> B) -> B {
    match isa {
        Some(isa) => set(builder, isa),
        None => builder,
    }
}

/// A mechanism that takes queries, keys and values alone.
struct Plain<M>(M);

pub(super) struct LightningEntry;
impl Recipe for LightningEntry {
    const NAME: &'static str = "lightning";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2307.14995, 2401.04658, 2405.17381";
    const SUMMARY: &'static str = "a state that every head forgets at a fixed rate";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Plain<Lightning>>(x, isa, seed)
    }
}

impl<T: Element> Case<T> for Plain<Lightning> {
    type Mechanism = Lightning;

    fn new(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Self> {
        Ok(Self(on(Lightning::builder(x.q.dim().1), isa, |builder, isa| builder.isa(isa)).build()?))
    }
    fn mechanism(&self) -> &Lightning {
        &self.0
    }
    fn input<'a>(&'a self, x: Qkv<'a, T>) -> Qkv<'a, T> {
        x
    }
}
