//! Numbers that are hard: NaN and infinity, masked and visible, sharp and
//! large scores, rounding to half types, real inputs, logarithms of sums.

mod common;

use std::sync::Arc;

use attention_kernels::attention::ERROR_CONSTANT;
use attention_kernels::dense::{Dense, DenseBuilder, Selective, Sigmoid, Tempered};
use attention_kernels::input::{Dims, Lengths};
use attention_kernels::mask::{
    Boolean, Causal, Documents, Mask, Prefix, Tree, Unmasked, Window, mask_fn, mask_fn_per_head,
};
use attention_kernels::score::{Alibi, Bias, RelativeTable, Score, Softcap, score_fn};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Bounded, Element, Mergeable, Qkv, Weights};
use common::{Random, Ratio, check, fixture, rms_error, same_bits};
use half::{bf16, f16};
use ndarray::{Array2, Array3, Array4, s};

/// A mechanism over queries, keys and values, whatever its type.
trait Mechanism<T> {
    fn run(&self, x: Qkv<'_, T>) -> Array4<T>;
    fn definition(&self, x: Qkv<'_, T>) -> Array4<f64>;
    fn bound(&self, x: Qkv<'_, T>) -> Array3<f64>;
}

impl<T: Element, A> Mechanism<T> for A
where
    A: for<'a> Bounded<Qkv<'a, T>>,
{
    fn run(&self, x: Qkv<'_, T>) -> Array4<T> {
        self.forward(x).unwrap_or_else(|error| panic!("{error}"))
    }
    fn definition(&self, x: Qkv<'_, T>) -> Array4<f64> {
        self.reference(x).unwrap_or_else(|error| panic!("{error}"))
    }
    fn bound(&self, x: Qkv<'_, T>) -> Array3<f64> {
        self.error_bound(x).unwrap_or_else(|error| panic!("{error}"))
    }
}

type Mechanisms<T> = Vec<(Isa, Box<dyn Mechanism<T>>)>;

/// The same mechanism on every instruction set.
fn on_each_isa<T: Element, M, F>(builder: DenseBuilder<M, F>) -> Mechanisms<T>
where
    M: Mask + Clone + 'static,
    F: Score + Clone + 'static,
{
    let make = |isa| -> (Isa, Box<dyn Mechanism<T>>) {
        let dense = builder.clone().isa(isa).build();
        (isa, Box::new(dense.unwrap_or_else(|error| panic!("{error}"))))
    };
    Isa::available().map(make).collect()
}

/// Queries, keys and values.
#[derive(Clone)]
struct Arrays<T> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
}

impl<T: Element> Arrays<T> {
    fn normal(dims: &Dims, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let &Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, .. } = dims;
        Self {
            q: random.array((batch, q_heads, q_len, head_dim)),
            k: random.array((batch, kv_heads, kv_len, head_dim)),
            v: random.array((batch, kv_heads, kv_len, value_dim)),
        }
    }

    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// Holds a mechanism to its definition on every instruction set.
fn holds<T: Element>(what: &str, mechanisms: &Mechanisms<T>, x: Qkv<'_, T>) -> Ratio {
    let (defined, bound) = (mechanisms[0].1.definition(x.reborrow()), mechanisms[0].1.bound(x.reborrow()));
    let mut ratio = Ratio::default();
    for (isa, mechanism) in mechanisms {
        let what = format!("{what}, {}, {isa:?}", T::DTYPE.name());
        ratio.join(check(&what, &mechanism.run(x.reborrow()), &defined, &bound));
    }
    ratio
}

const fn dims(sizes: [usize; 7]) -> Dims {
    let [batch, kv_heads, group, q_len, kv_len, head_dim, value_dim] = sizes;
    let q_heads = kv_heads * group;
    Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false }
}

/// Many queries, few queries, and few queries with keys for two chunks: the
/// ways that a call may take through the engines.
const WAYS: [Dims; 3] =
    [dims([2, 1, 2, 70, 300, 24, 20]), dims([2, 2, 2, 4, 300, 24, 20]), dims([1, 1, 2, 3, 1100, 24, 20])];

fn leak<T>(x: T) -> &'static T {
    Box::leak(Box::new(x))
}

type NamedMask = (&'static str, Arc<dyn Mask>);

/// A mask of every kind.
fn masks(dims: &Dims) -> Vec<NamedMask> {
    let mut random = Random::new(7);
    let &Dims { batch, q_heads, q_len, kv_len, .. } = dims;
    let ids = |len: usize, of: &dyn Fn(usize) -> usize| (0..len).map(|i| of(i) as u32).collect::<Vec<_>>();
    let offset = kv_len - q_len;
    let runs = |i: usize| i / 37;
    let mixed = |i: usize| i % 3;
    let documents =
        |of: &dyn Fn(usize) -> usize| Documents::of(&ids(q_len, &|i| of(i + offset)), &ids(kv_len, of));
    let parents: Vec<_> =
        (0..q_len).map(|i| i.checked_sub(1).map(|last| last - random.below(last.min(3)))).collect();
    let tree = Tree::new(&parents).unwrap_or_else(|error| panic!("{error}"));
    let visible =
        leak(Array4::from_shape_simple_fn((batch, q_heads, q_len, kv_len), || random.below(3) == 0));
    let padding =
        leak(Array4::from_shape_fn((batch, 1, 1, kv_len), |(b, _, _, j)| j < kv_len - 30 * (b + 1)));
    // As a slice of every other column of something larger.
    let strided = leak(Array4::from_shape_simple_fn((1, 1, q_len, 2 * kv_len), || random.below(2) == 0));
    vec![
        ("causal", Arc::new(Causal::new())),
        ("causal from 0", Arc::new(Causal::at(0))),
        ("causal from -2", Arc::new(Causal::at(-2))),
        ("window to the left", Arc::new(Window::new(Some(20), Some(0)))),
        ("window to both sides", Arc::new(Window::new(Some(150), Some(9)).at(90))),
        ("prefix", Arc::new(Prefix::new(30).at(10))),
        ("documents in runs", Arc::new(documents(&runs))),
        ("documents in pieces", Arc::new(documents(&mixed))),
        ("tree", Arc::new(tree)),
        ("array", Arc::new(Boolean::new(visible.view()))),
        ("padding array", Arc::new(Boolean::new(padding.view()))),
        ("strided array", Arc::new(Boolean::new(strided.slice(s![.., .., .., ..;2])))),
        ("closure", Arc::new(mask_fn(|_, query, key| (query * 7 + key) % 5 < 2))),
        (
            "closure per head",
            Arc::new(mask_fn_per_head(|site, query, key| (key + site.batch + query) % (site.head + 2) == 0)),
        ),
        ("not", Arc::new(Window::new(Some(100), Some(100)).not())),
        ("and", Arc::new(Causal::new().and(documents(&mixed)))),
        ("or", Arc::new(Window::new(Some(5), Some(0)).or(Prefix::new(4).at(-400)))),
        ("nothing", Arc::new(mask_fn(|_, _, _| false))),
    ]
}

/// Sets of keys to be spoilt: the one that divides rows most evenly, and
/// what the first, middle and last row do not see.
fn spoilt_keys(visible: &Array4<bool>) -> Vec<Vec<usize>> {
    let (_, heads, q_len, kv_len) = visible.dim();
    let seen_by = |j: usize| visible.slice(s![.., .., .., j]).iter().filter(|&&seen| seen).count();
    let rows = visible.len() / kv_len;
    let divides = (0..kv_len).max_by_key(|&j| seen_by(j).min(rows - seen_by(j)));
    let hidden =
        |head: usize, i: usize| (0..kv_len).filter(|&j| !visible[[0, head, i, j]]).collect::<Vec<_>>();
    vec![
        divides.into_iter().collect(),
        hidden(0, 0),
        hidden(heads - 1, q_len / 2),
        hidden(0, q_len - 1),
        (0..kv_len).collect(),
    ]
}

fn bits<T: Element>(x: T) -> u32 {
    x.to_f32().to_bits()
}

/// Spoils keys and values of `mechanisms` and looks at every row: one that
/// sees nothing spoilt has the bits that it has without, every other shows it.
fn spoil<T: Element>(what: &str, mechanisms: &Mechanisms<T>, dims: &Dims, visible: &Array4<bool>) {
    let clean = Arrays::<T>::normal(dims, 11);
    holds(what, mechanisms, clean.qkv());
    let before: Vec<_> = mechanisms.iter().map(|(_, mechanism)| mechanism.run(clean.qkv())).collect();
    let (mut safe, mut shown) = (0, 0);
    for keys in spoilt_keys(visible) {
        let poisons = [
            (true, f32::NAN),
            (true, f32::INFINITY),
            (false, f32::NAN),
            (false, f32::INFINITY),
            (false, f32::NEG_INFINITY),
        ];
        for (in_keys, poison) in poisons {
            let mut x = clean.clone();
            for &j in &keys {
                let array = if in_keys { &mut x.k } else { &mut x.v };
                array.slice_mut(s![.., .., j, ..]).fill(T::from_f32(poison));
            }
            for ((isa, mechanism), before) in mechanisms.iter().zip(&before) {
                let got = mechanism.run(x.qkv());
                for (b, h, i) in ndarray::indices((dims.batch, dims.q_heads, dims.q_len)) {
                    let row = got.slice(s![b, h, i, ..]);
                    let place = || {
                        let array = if in_keys { "keys" } else { "values" };
                        format!(
                            "{what}, {}, {isa:?}, {poison} in {} {array}, row [{b}, {h}, {i}]",
                            T::DTYPE.name(),
                            keys.len()
                        )
                    };
                    if keys.iter().any(|&j| visible[[b, h, i, j]]) {
                        shown += 1;
                        let shows = |x: &T| {
                            let x = x.to_f32();
                            if in_keys || poison.is_nan() { x.is_nan() } else { !x.is_finite() }
                        };
                        let numbers = || row.mapv(Element::to_f32);
                        assert!(row.iter().all(shows), "{} does not show it: {}", place(), numbers());
                    } else {
                        safe += 1;
                        let same = |(c, x): (usize, &T)| bits(*x) == bits(before[[b, h, i, c]]);
                        assert!(row.iter().enumerate().all(same), "{}: what is masked matters", place());
                    }
                }
            }
        }
    }
    assert!(safe > 0, "{what}: no row was safe");
    assert!(shown > 0 || visible.iter().all(|&seen| !seen), "{what}: no row saw what was spoilt");
}

fn masked_cannot_matter<T: Element>() {
    for dims in &WAYS {
        for (name, mask) in masks(dims) {
            let visible = mask.materialize(dims);
            let what = format!("{name}, {} queries", dims.q_len);
            spoil::<T>(&what, &on_each_isa(Dense::builder().mask(mask)), dims, &visible);
        }
    }
}

#[test]
fn what_is_masked_cannot_matter_f32() {
    masked_cannot_matter::<f32>();
}

#[test]
fn what_is_masked_cannot_matter_f16() {
    masked_cannot_matter::<f16>();
}

#[test]
fn what_is_masked_cannot_matter_bf16() {
    masked_cannot_matter::<bf16>();
}

/// Every third key hidden by a bias of -inf, the others changed.
fn hiding_bias(dims: &Dims) -> (&'static Array4<f32>, Array4<bool>) {
    let mut random = Random::new(5);
    let shape = (dims.batch, dims.q_heads, dims.q_len, dims.kv_len);
    let visible = Array4::from_shape_simple_fn(shape, || random.below(3) != 0);
    let bias = visible.mapv(|seen| if seen { random.normal() as f32 } else { f32::NEG_INFINITY });
    (leak(bias), visible)
}

#[test]
fn what_a_score_hides_cannot_matter() {
    for dims in &WAYS {
        let (bias, visible) = hiding_bias(dims);
        let bias = Bias::new(bias.view());
        let what = |name: &str| format!("{name}, {} queries", dims.q_len);
        let dense = Dense::builder().score(bias.clone());
        spoil::<f32>(&what("bias"), &on_each_isa(dense.clone()), dims, &visible);
        spoil::<bf16>(&what("bias"), &on_each_isa(dense), dims, &visible);
        let softcap = Softcap::new(20.0).unwrap_or_else(|error| panic!("{error}"));
        let dense = Dense::builder().score(bias.clone().then(softcap));
        spoil::<f32>(&what("bias, then softcap"), &on_each_isa(dense), dims, &visible);
        let dense = Dense::builder().score(softcap.then(bias));
        spoil::<f32>(&what("softcap, then bias"), &on_each_isa(dense), dims, &visible);

        let near = |i: usize, j: usize| (i + dims.kv_len - dims.q_len).abs_diff(j) <= 40;
        let table = Array2::from_shape_fn((1, 83), |(_, column)| {
            if (1..82).contains(&column) { 0.1 * column as f32 } else { f32::NEG_INFINITY }
        });
        let shape = (dims.batch, dims.q_heads, dims.q_len, dims.kv_len);
        let visible = Array4::from_shape_fn(shape, |(_, _, i, j)| near(i, j));
        let table = RelativeTable::new(table).unwrap_or_else(|error| panic!("{error}"));
        spoil::<f32>(&what("relative table"), &on_each_isa(Dense::builder().score(table)), dims, &visible);

        let visible = Array4::from_shape_fn(shape, |(_, _, i, j)| (i + j) % 4 != 1);
        let closure =
            score_fn(|score, _, i, j| if (i + j) % 4 == 1 { f32::NEG_INFINITY } else { score * 0.5 });
        spoil::<f32>(&what("closure"), &on_each_isa(Dense::builder().score(closure)), dims, &visible);
    }
}

/// [`Selective`] with temperatures of its own.
struct WithTemperatures {
    selective: Selective<Causal>,
    query: Array3<f32>,
    value: Array3<f32>,
}

impl WithTemperatures {
    fn input<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Tempered<'a, T> {
        Tempered { qkv: x, query: self.query.view(), value: self.value.view() }
    }
}

impl Mechanism<f32> for WithTemperatures {
    fn run(&self, x: Qkv<'_, f32>) -> Array4<f32> {
        self.selective.forward(self.input(x.reborrow())).unwrap_or_else(|error| panic!("{error}"))
    }
    fn definition(&self, x: Qkv<'_, f32>) -> Array4<f64> {
        self.selective.reference(self.input(x.reborrow())).unwrap_or_else(|error| panic!("{error}"))
    }
    fn bound(&self, x: Qkv<'_, f32>) -> Array3<f64> {
        self.selective.error_bound(self.input(x.reborrow())).unwrap_or_else(|error| panic!("{error}"))
    }
}

#[test]
fn what_is_masked_cannot_matter_to_sigmoid_and_selective() {
    for dims in &WAYS {
        let what = |name: &str| format!("{name}, {} queries", dims.q_len);
        let visible = Causal::new().materialize(dims);
        let sigmoid = |isa| -> (Isa, Box<dyn Mechanism<f32>>) {
            let sigmoid = Sigmoid::builder().causal().isa(isa).build();
            (isa, Box::new(sigmoid.unwrap_or_else(|error| panic!("{error}"))))
        };
        spoil(&what("sigmoid"), &Isa::available().map(sigmoid).collect(), dims, &visible);
        let selective = |isa| -> (Isa, Box<dyn Mechanism<f32>>) {
            let mut random = Random::new(3);
            let selective = Selective::builder().causal().isa(isa).build();
            let mut temperatures = |heads, len| {
                Array3::from_shape_simple_fn((dims.batch, heads, len), || random.uniform() as f32 + 0.5)
            };
            let (query, value) =
                (temperatures(dims.q_heads, dims.q_len), temperatures(dims.kv_heads, dims.kv_len));
            (
                isa,
                Box::new(WithTemperatures {
                    selective: selective.unwrap_or_else(|e| panic!("{e}")),
                    query,
                    value,
                }),
            )
        };
        spoil(&what("selective"), &Isa::available().map(selective).collect(), dims, &visible);
    }
}

/// What lies beyond the key lengths, or in the other sequences of a packed
/// batch, does not change a bit.
fn others_cannot_matter<T: Element>() {
    for dims in &WAYS {
        let mask: Arc<dyn Mask> = Arc::new(Causal::new());
        let mechanisms = on_each_isa::<T, _, _>(Dense::builder().mask(mask));
        let lengths: Vec<_> = (0..dims.batch).map(|b| dims.kv_len - 41 - 200 * b).collect();
        let clean = Arrays::<T>::normal(dims, 23);
        let mut spoilt = clean.clone();
        for (b, &len) in lengths.iter().enumerate() {
            spoilt.k.slice_mut(s![b, .., len.., ..]).fill(T::from_f32(f32::NAN));
            spoilt.v.slice_mut(s![b, .., len.., ..]).fill(T::from_f32(f32::INFINITY));
        }
        let what = format!("key lengths, {} queries", dims.q_len);
        holds(&what, &mechanisms, spoilt.qkv().key_lengths(&lengths));
        for (isa, mechanism) in &mechanisms {
            let [a, b] = [&clean, &spoilt].map(|x| mechanism.run(x.qkv().key_lengths(&lengths)));
            assert!(same_bits(&a, &b), "{what}, {}, {isa:?}: keys beyond the length matter", T::DTYPE.name());
        }

        // One entry of the batch is enough: three sequences in it.
        let dims = &Dims { batch: 1, ..*dims };
        let clean = Arrays::<T>::normal(dims, 29);
        let (queries, keys) = ([0, 1, dims.q_len - 1, dims.q_len], [0, 70, 201, dims.kv_len]);
        let mut spoilt = clean.clone();
        for s in [0, 2] {
            spoilt.q.slice_mut(s![.., .., queries[s]..queries[s + 1], ..]).fill(T::from_f32(f32::INFINITY));
            spoilt.k.slice_mut(s![.., .., keys[s]..keys[s + 1], ..]).fill(T::from_f32(f32::NAN));
            spoilt.v.slice_mut(s![.., .., keys[s]..keys[s + 1], ..]).fill(T::from_f32(f32::NAN));
        }
        let what = format!("packed, {} queries", dims.q_len);
        holds(&what, &mechanisms, clean.qkv().packed(&queries, &keys));
        for (isa, mechanism) in &mechanisms {
            let [a, b] = [&clean, &spoilt].map(|x| {
                let out = mechanism.run(x.qkv().packed(&queries, &keys));
                out.slice(s![.., .., queries[1]..queries[2], ..]).to_owned()
            });
            assert!(same_bits(&a, &b), "{what}, {}, {isa:?}: a neighbour matters", T::DTYPE.name());
        }
    }
}

#[test]
fn other_sequences_and_keys_beyond_the_length_cannot_matter() {
    others_cannot_matter::<f32>();
    others_cannot_matter::<f16>();
    others_cannot_matter::<bf16>();
}

/// A poison in one element of a query: its row shows it, no other row has
/// another bit.
fn in_a_query<T: Element>(mechanisms: &Mechanisms<T>, dims: &Dims, visible: &Array4<bool>) {
    let clean = Arrays::<T>::normal(dims, 31);
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (head, query, c) in [(0, 0, 0), (dims.q_heads - 1, dims.q_len / 2, 13), (0, dims.q_len - 1, 23)] {
            let mut x = clean.clone();
            x.q[[0, head, query, c]] = T::from_f32(poison);
            let what = format!("{poison} in query {query} of {}, head {head}", dims.q_len);
            holds(&what, mechanisms, x.qkv());
            let seen = visible.slice(s![0, head, query, ..]).iter().filter(|&&seen| seen).count();
            // Of few scores all may be -inf, which hides their keys.
            if !poison.is_nan() && (1..20).contains(&seen) {
                continue;
            }
            for (isa, mechanism) in mechanisms {
                let what = format!("{what}, {}, {isa:?}", T::DTYPE.name());
                let (before, mut after) = (mechanism.run(clean.qkv()), mechanism.run(x.qkv()));
                let mut row = after.slice_mut(s![0, head, query, ..]);
                let shows = |x: &T| x.to_f32().is_nan();
                assert!(row.iter().all(|x| shows(x) == (seen > 0)), "{what}: {:?}", row.mapv(|x| x.to_f32()));
                row.assign(&before.slice(s![0, head, query, ..]));
                assert!(same_bits(&before, &after), "{what}: another row changed");
            }
        }
    }
}

/// A poison in one element of a key or a value: rows that see it show it.
fn in_a_key_or_value<T: Element>(mechanisms: &Mechanisms<T>, dims: &Dims, visible: &Array4<bool>) {
    let clean = Arrays::<T>::normal(dims, 37);
    let (defined, bound) = (mechanisms[0].1.definition(clean.qkv()), mechanisms[0].1.bound(clean.qkv()));
    let group = dims.q_heads / dims.kv_heads;
    for key in [0, 5, 127, 128, dims.kv_len - dims.q_len, dims.kv_len - 1] {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let what = format!("{poison} in key {key} of {}, {} queries", dims.kv_len, dims.q_len);
            let (kv_head, c) = (dims.kv_heads - 1, 17);
            let sees =
                |b: usize, h: usize, i: usize| b == 0 && h / group == kv_head && visible[[b, h, i, key]];

            let mut x = clean.clone();
            x.k[[0, kv_head, key, c]] = T::from_f32(poison);
            if poison.is_nan() {
                for (isa, mechanism) in mechanisms {
                    for ((b, h, i, c), x) in mechanism.run(x.qkv()).indexed_iter() {
                        let x = x.to_f64();
                        assert_eq!(x.is_nan(), sees(b, h, i), "{what}, {isa:?}: [{b}, {h}, {i}, {c}]: {x}");
                    }
                }
            }
            // A score of +inf gives NaN, one of -inf hides the key.
            holds(&what, mechanisms, x.qkv());

            let mut x = clean.clone();
            x.v[[0, kv_head, key, c]] = T::from_f32(poison);
            for (isa, mechanism) in mechanisms {
                for (((b, h, i, column), &want), x) in defined.indexed_iter().zip(&mechanism.run(x.qkv())) {
                    let x = x.to_f64();
                    let place =
                        || format!("value: {what}, {}, {isa:?}: [{b}, {h}, {i}, {column}]", T::DTYPE.name());
                    if column == c && sees(b, h, i) {
                        assert!(
                            if poison.is_nan() { x.is_nan() } else { x == f64::from(poison) },
                            "{}: {x}",
                            place()
                        );
                    } else {
                        let allowed = bound[[b, h, i]] * (1.0 + T::ROUNDING) + common::rounding::<T>(want);
                        assert!((x - want).abs() <= allowed, "{}: {x} instead of {want}", place());
                    }
                }
            }
        }
    }
}

fn visible_shows<T: Element>() {
    for dims in &WAYS {
        let masks: [Arc<dyn Mask>; 4] = [
            Arc::new(Unmasked),
            Arc::new(Causal::new()),
            Arc::new(Causal::at(-1)),
            Arc::new(mask_fn(|_, query, key| (query * 7 + key) % 5 < 2)),
        ];
        for mask in masks {
            let visible = mask.materialize(dims);
            let mechanisms = on_each_isa::<T, _, _>(Dense::builder().mask(mask));
            in_a_query(&mechanisms, dims, &visible);
            in_a_key_or_value(&mechanisms, dims, &visible);
        }
    }
}

#[test]
fn what_is_visible_shows_f32() {
    visible_shows::<f32>();
}

#[test]
fn what_is_visible_shows_f16() {
    visible_shows::<f16>();
}

#[test]
fn what_is_visible_shows_bf16() {
    visible_shows::<bf16>();
}

fn sharp<T: Element>() {
    let mut ratio = Ratio::default();
    for (n, dims) in WAYS.iter().enumerate() {
        let x = Arrays::<T>::normal(dims, 41 + n as u64);
        for times in [1.0, 2.0, 4.0, 8.0] {
            let scale = times / (dims.head_dim as f32).sqrt();
            let what = format!("scale {times} times the default, {} queries", dims.q_len);
            let mask: Arc<dyn Mask> = Arc::new(Causal::new());
            ratio.join(holds(&what, &on_each_isa(Dense::builder().mask(mask).scale(scale)), x.qkv()));
        }
        // Scores down to 400 below the largest, through where exponentials
        // become subnormal and then 0.
        let mut random = Random::new(43);
        let shape = (1, dims.q_heads, dims.q_len, dims.kv_len);
        let bias = leak(Array4::from_shape_simple_fn(shape, || -400.0 * random.uniform() as f32));
        let dense = Dense::builder().score(Bias::new(bias.view()));
        ratio.join(holds(&format!("spread scores, {} queries", dims.q_len), &on_each_isa(dense), x.qkv()));
    }
    ratio.report(&format!("sharp scores, {}", T::DTYPE.name()));
}

#[test]
fn sharp_scores_stay_within_the_bound() {
    sharp::<f32>();
    sharp::<f16>();
    sharp::<bf16>();
}

#[test]
fn steep_alibi_stays_within_the_bound() {
    let mut ratio = Ratio::default();
    for dims in &WAYS {
        let x = Arrays::<f32>::normal(dims, 47);
        let slopes: Vec<_> = (0..dims.q_heads).map(|h| [1.5, -0.75, 20.0, 0.01][h % 4]).collect();
        let alibi = Alibi::from_slopes(&slopes).unwrap_or_else(|error| panic!("{error}"));
        let dense = Dense::builder().score(alibi);
        ratio.join(holds(&format!("steep ALiBi, {} queries", dims.q_len), &on_each_isa(dense), x.qkv()));
    }
    ratio.report("steep ALiBi, f32");
}

fn odd_scales<T: Element>() {
    for dims in &WAYS {
        let x = Arrays::<T>::normal(dims, 53);
        for scale in [0.0, -0.0, -0.2, -1.6, 1e-30, 1e-42] {
            let what = format!("scale {scale}, {} queries", dims.q_len);
            holds(
                &what,
                &on_each_isa(Dense::builder().mask(Arc::new(Unmasked) as Arc<dyn Mask>).scale(scale)),
                x.qkv(),
            );
        }
        // A scale of 0 is the mean of the values.
        let mechanisms =
            on_each_isa::<T, _, _>(Dense::builder().mask(Arc::new(Unmasked) as Arc<dyn Mask>).scale(0.0));
        let group = dims.q_heads / dims.kv_heads;
        for (isa, mechanism) in &mechanisms {
            for ((b, h, _, c), x_out) in mechanism.run(x.qkv()).indexed_iter() {
                let column = x.v.slice(s![b, h / group, .., c]);
                let mean = column.iter().map(|x| x.to_f64()).sum::<f64>() / dims.kv_len as f64;
                let error = (x_out.to_f64() - mean).abs();
                assert!(
                    error <= 1e-5 + T::ROUNDING * mean.abs(),
                    "{isa:?}, [{b}, {h}, _, {c}]: off by {error}"
                );
            }
        }
    }
}

#[test]
fn zero_negative_and_tiny_scales() {
    odd_scales::<f32>();
    odd_scales::<f16>();
    odd_scales::<bf16>();
}

#[test]
fn large_scores() {
    let mut ratio = Ratio::default();
    for dims in &WAYS {
        let mask = || Arc::new(Causal::new()) as Arc<dyn Mask>;
        // Around 1e4 both ways.
        let mut x = Arrays::<f32>::normal(dims, 59);
        x.q *= 1e4;
        let what = format!("scores of 1e4, {} queries", dims.q_len);
        ratio.join(holds(&what, &on_each_isa(Dense::builder().mask(mask())), x.qkv()));
        // Up to 1e38: all weight is on the largest score.
        for size in [1e10f32, 1e18] {
            let mut x = Arrays::<f32>::normal(dims, 61);
            x.q *= size;
            x.k *= size;
            let mechanisms = on_each_isa::<f32, _, _>(Dense::builder().mask(mask()));
            let defined = mechanisms[0].1.definition(x.qkv());
            for (isa, mechanism) in &mechanisms {
                for ((i, got), want) in mechanism.run(x.qkv()).indexed_iter().zip(&defined) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(
                        error <= 1e-6,
                        "scores of {size:e} squared, {isa:?}, {i:?}: {got} instead of {want}"
                    );
                }
            }
        }
        // Values up to the largest number that there is.
        let mut x = Arrays::<f32>::normal(dims, 67);
        x.v.mapv_inplace(|x| x.clamp(-1.0, 1.0) * 1e34);
        let what = format!("values of 1e34, {} queries", dims.q_len);
        ratio.join(holds(&what, &on_each_isa(Dense::builder().mask(mask())), x.qkv()));
    }
    ratio.report("large scores, f32");
}

/// The error of a half type, next to what rounding the definition costs.
fn half_rms<T: Element>() {
    for (dims, causal) in [
        (dims([1, 1, 2, 300, 300, 64, 64]), true),
        (dims([2, 2, 1, 129, 257, 128, 40]), false),
        (dims([2, 2, 4, 1, 2100, 64, 64]), true),
        (dims([2, 2, 4, 3, 500, 128, 128]), false),
    ] {
        let x = Arrays::<T>::normal(&dims, 71);
        let mask: Arc<dyn Mask> = if causal { Arc::new(Causal::new()) } else { Arc::new(Unmasked) };
        for (isa, mechanism) in &on_each_isa::<T, _, _>(Dense::builder().mask(mask)) {
            let defined = mechanism.definition(x.qkv());
            let error = rms_error(&mechanism.run(x.qkv()), &defined);
            let rounded = rms_error(&defined.mapv(|x| T::from_f32(x as f32)), &defined);
            println!(
                "{}, {isa:?}: {error:.3e}, rounding alone {rounded:.3e}: {:.4}",
                T::DTYPE.name(),
                error / rounded
            );
            assert!(
                error <= 1.02 * rounded,
                "{}, {isa:?}, {dims:?}: {error:.3e}, {rounded:.3e}",
                T::DTYPE.name()
            );
        }
    }
}

#[test]
fn half_types_cost_what_rounding_costs() {
    half_rms::<f16>();
    half_rms::<bf16>();
}

/// Numbers are split into parts where products take `bf16`: fewest parts at
/// the smallest `head_dim` for them, and few keys, leave the bound least room.
fn few_keys<T: Element>() {
    let mut ratio = Ratio::default();
    for head_dim in [63, 64, 128] {
        for seed in 0..12 {
            let dims = dims([1, 1, 2, 70, 70, head_dim, 33]);
            let x = Arrays::<T>::normal(&dims, 200 + seed);
            for times in [0.3, 1.0, 4.0] {
                let mask: Arc<dyn Mask> = Arc::new(Causal::new());
                let builder = Dense::builder().mask(mask).scale(times / (head_dim as f32).sqrt());
                let what = format!("{head_dim} columns, scale {times} times the default");
                ratio.join(holds(&what, &on_each_isa(builder.clone()), x.qkv()));
                ratio.join(lse_holds(&what, &builder, x.qkv(), None));
            }
        }
    }
    ratio.report(&format!("few keys, {}", T::DTYPE.name()));
}

#[test]
fn few_keys_stay_within_the_bound() {
    few_keys::<f32>();
    few_keys::<f16>();
    few_keys::<bf16>();
}

/// Some instructions for `bf16` take subnormal numbers for zero, and parts of
/// the largest numbers overflow; of sums in an output alone is that allowed.
fn extremes<T: Element>(sizes: &[f32]) {
    for dims in [dims([1, 1, 2, 70, 300, 64, 40]), dims([2, 1, 1, 40, 140, 24, 70])] {
        let mechanisms = || {
            let mask: Arc<dyn Mask> = Arc::new(Causal::new());
            on_each_isa::<T, _, _>(Dense::builder().mask(mask).scale(0.3))
        };
        // Of queries or keys, where the other factor is huge.
        for in_query in [true, false] {
            let mut x = Arrays::<T>::normal(&dims, 311);
            let (tiny, huge) = (T::from_f32(9e-39), T::from_f32(3e38));
            let (in_q, in_k) = if in_query { (tiny, huge) } else { (huge, tiny) };
            assert!(huge.to_f32().is_finite() && tiny.to_f32() > 0.0);
            x.q.slice_mut(s![.., .., .., 5]).fill(T::from_f32(0.0));
            x.k.slice_mut(s![.., .., .., 5]).fill(T::from_f32(0.0));
            x.q.slice_mut(s![.., .., 3.., 5]).fill(in_q);
            x.k.slice_mut(s![.., .., 20, 5]).fill(in_k);
            let (of_query, of_key) = (x.q[[0, 0, 30, 5]].to_f32(), x.k[[0, 0, 20, 5]].to_f32());
            assert!(of_query * of_key > 2.0);
            holds(&format!("subnormal numbers, in queries: {in_query}"), &mechanisms(), x.qkv());
        }
        // Of products of values with weights, where the sums are normal.
        for &size in sizes {
            let mut x = Arrays::<T>::normal(&dims, 313);
            x.v.mapv_inplace(|x| T::from_f32(x.to_f32() * size));
            holds(&format!("values of {size}"), &mechanisms(), x.qkv());
        }
    }
}

#[test]
fn subnormal_and_huge_numbers_count() {
    extremes::<bf16>(&[1e-30, 1e-33, 1e33]);
    extremes::<f32>(&[1e-25, 1e-28, 1e-30, 1e-33, 1e29, 1e30, 1e33]);
}

#[test]
fn rms_error_of_f32_on_normal_inputs() {
    let dims = dims([1, 1, 1, 1024, 1024, 128, 128]);
    let x = Arrays::<f32>::normal(&dims, 73);
    for (times, limit) in [(1.0, 3.6e-7), (8.0, 1.4e-6)] {
        let mask: Arc<dyn Mask> = Arc::new(Causal::new());
        let mechanisms = on_each_isa::<f32, _, _>(Dense::builder().mask(mask).scale(times / 128f32.sqrt()));
        let defined = mechanisms[0].1.definition(x.qkv());
        for (isa, mechanism) in &mechanisms {
            let error = rms_error(&mechanism.run(x.qkv()), &defined);
            println!(
                "normal inputs, scale {times} times the default, {isa:?}: {error:.3e}, at most {limit:.1e}"
            );
            assert!(
                error <= limit,
                "scale {times} times the default, {isa:?}: {error:.3e}, at most {limit:.1e}"
            );
        }
    }
}

/// The fixture's layers: within the bound for all types, and nearer than
/// plain `f32` arithmetic: the error of NumPy in `f32` on the same numbers is
/// 4.9e-7, 3.6e-7 and 2.8e-7.
#[test]
fn real_inputs() {
    let mut beyond = Vec::new();
    let mask = || Arc::new(Causal::new()) as Arc<dyn Mask>;
    for (layer, limit) in fixture::LAYERS.into_iter().zip([4.8e-7, 3.6e-7, 2.8e-7]) {
        let (q, k, v) = fixture::layer(layer);
        let half = Arrays { q, k, v };
        let x =
            Arrays { q: half.q.mapv(f16::to_f32), k: half.k.mapv(f16::to_f32), v: half.v.mapv(f16::to_f32) };
        let mechanisms = on_each_isa::<f32, _, _>(Dense::builder().mask(mask()));
        let (defined, bound) = (mechanisms[0].1.definition(x.qkv()), mechanisms[0].1.bound(x.qkv()));
        let mut ratio = Ratio::default();
        for (isa, mechanism) in &mechanisms {
            let got = mechanism.run(x.qkv());
            ratio.join(check(&format!("layer {layer}, {isa:?}"), &got, &defined, &bound));
            let error = rms_error(&got, &defined);
            let line = format!("layer {layer}, {isa:?}: {error:.3e}, at most {limit:.1e}");
            println!("{line}");
            if error > limit {
                beyond.push(line);
            }
        }
        ratio.report(&format!("layer {layer}, f32"));
        // The same numbers as f16: the definition is the same.
        for (isa, mechanism) in &on_each_isa::<f16, _, _>(Dense::builder().mask(mask())) {
            check(&format!("layer {layer} as f16, {isa:?}"), &mechanism.run(half.qkv()), &defined, &bound);
        }
    }
    assert!(beyond.is_empty(), "{beyond:#?}");
}

/// Holds the logarithms of sums to their definition.
fn lse_holds<T: Element, M: Mask + Clone, F: Score + Clone>(
    what: &str,
    builder: &DenseBuilder<M, F>,
    x: Qkv<'_, T>,
    sinks: Option<Vec<f32>>,
) -> Ratio {
    // The bound of the output for values of 1 is that of the relative error
    // of the sum; sinks do not take part.
    let ones = Array4::from_elem((x.v.dim().0, x.v.dim().1, x.v.dim().2, 1), T::from_f32(1.0));
    let fail = |error| -> ! { panic!("{what}: {error}") };
    let plain = builder.clone().build().unwrap_or_else(|e| fail(e));
    let bound = plain.error_bound(Qkv { v: ones.view(), ..x.reborrow() }).unwrap_or_else(|e| fail(e));
    let mut ratio = Ratio::default();
    for isa in Isa::available() {
        let what = format!("{what}, {}, {isa:?}", T::DTYPE.name());
        let builder = builder.clone().isa(isa);
        let dense = match &sinks {
            Some(sinks) => builder.sinks(sinks.clone()),
            None => builder,
        };
        let dense = dense.build().unwrap_or_else(|e| fail(e));
        let defined = dense.reference_lse(x.reborrow()).unwrap_or_else(|e| fail(e));
        let (out, lse) = dense.forward_with_lse(x.reborrow()).unwrap_or_else(|e| fail(e));
        let alone = dense.forward(x.reborrow()).unwrap_or_else(|e| fail(e));
        assert!(same_bits(&out, &alone), "{what}: asking for the LSE changes the output");
        for ((place, &got), &want) in lse.indexed_iter().zip(&defined) {
            if want.is_infinite() {
                assert_eq!(f64::from(got), want, "{what}: {place:?}");
                continue;
            }
            let error = (f64::from(got) - want).abs();
            // The result is rounded too.
            let allowed = bound[place] + 2f64.powi(-24) * want.abs();
            assert!(error <= allowed, "{what}: {place:?}: {got} instead of {want}, {allowed:.3e} is allowed");
            ratio.see(error / allowed * ERROR_CONSTANT, format!("{what}: {place:?}"));
        }
    }
    ratio
}

fn lse<T: Element>() {
    let mut ratio = Ratio::default();
    for dims in &WAYS {
        let x = Arrays::<T>::normal(dims, 79);
        let masks: [NamedMask; 4] = [
            ("everything", Arc::new(Unmasked)),
            ("causal from -2", Arc::new(Causal::at(-2))),
            ("window", Arc::new(Window::new(Some(20), Some(3)))),
            ("nothing", Arc::new(mask_fn(|_, _, _| false))),
        ];
        for (name, mask) in masks {
            for times in [1.0, 8.0, -3.0] {
                let what = format!("{name}, scale {times} times the default, {} queries", dims.q_len);
                let builder =
                    Dense::builder().mask(mask.clone()).scale(times / (dims.head_dim as f32).sqrt());
                ratio.join(lse_holds(&what, &builder, x.qkv(), None));
                let sinks = (0..dims.q_heads).map(|h| [3.0, f32::NEG_INFINITY, 60.0, -50.0][h % 4]).collect();
                ratio.join(lse_holds(&format!("sinks, {what}"), &builder, x.qkv(), Some(sinks)));
            }
        }
        let lengths: Vec<_> = (0..dims.batch).map(|b| b * 5).collect();
        let builder = Dense::builder().mask(Arc::new(Causal::new()) as Arc<dyn Mask>);
        let x = x.qkv().key_lengths(&lengths);
        assert!(matches!(x.lengths, Lengths::Keys(_)));
        ratio.join(lse_holds("few keys", &builder, x, None));
    }
    ratio.report(&format!("LSE, {}", T::DTYPE.name()));
}

#[test]
fn lse_is_within_the_bound() {
    lse::<f32>();
    lse::<f16>();
    lse::<bf16>();
}

#[test]
fn lse_of_spread_scores() {
    for dims in &WAYS {
        let x = Arrays::<f32>::normal(dims, 83);
        let mut random = Random::new(89);
        let shape = (1, 1, dims.q_len, dims.kv_len);
        let bias = Array4::from_shape_simple_fn(shape, || 400.0 * (random.uniform() as f32 - 0.5));
        let builder = Dense::builder().score(Bias::new(bias.view()));
        lse_holds("spread scores", &builder, x.qkv(), None).report("LSE of spread scores, f32");
    }
}

fn sigmoids(bias: Option<f32>, scale: Option<f32>) -> impl Iterator<Item = (Isa, Sigmoid)> {
    Isa::available().map(move |isa| {
        let mut builder = Sigmoid::builder().isa(isa);
        if let Some(bias) = bias {
            builder = builder.bias(bias);
        }
        if let Some(scale) = scale {
            builder = builder.scale(scale);
        }
        (isa, builder.build().unwrap_or_else(|error| panic!("{error}")))
    })
}

#[test]
fn sigmoid_of_zero_scores_is_one_over_n_and_one() {
    for dims in &WAYS {
        let mut x = Arrays::<f32>::normal(dims, 97);
        x.q.fill(0.0);
        x.v.fill(1.0);
        let n = dims.kv_len as f64;
        for (isa, sigmoid) in sigmoids(None, None) {
            let weights = sigmoid.weights(x.qkv()).unwrap_or_else(|error| panic!("{error}"));
            for weight in &weights {
                let error = (f64::from(*weight) * (n + 1.0) - 1.0).abs();
                assert!(error <= 1e-6, "{isa:?}, {n} keys: a weight of {weight}");
            }
            for out in &sigmoid.run(x.qkv()) {
                // n weights of 1 / (n + 1); in f32 even their sum rounds n times.
                let error = (f64::from(*out) - n / (n + 1.0)).abs();
                assert!(error <= 1e-6 + n / 2f64.powi(25), "{isa:?}, {n} keys: {out}");
            }
        }
    }
}

#[test]
fn sigmoid_far_below_zero_is_an_exponential() {
    // One key, so that the output is the weight: e^bias e^s / (1 + ...).
    let key = Array4::<f32>::ones((1, 1, 1, 1));
    for q_len in [1, 40] {
        for bias in [-20.0f32, -60.0, -80.0] {
            let q = Array4::from_shape_fn((1, 1, q_len, 1), |(_, _, i, _)| -0.125 * i as f32);
            let x = Qkv::new(q.view(), key.view(), key.view());
            for (isa, sigmoid) in sigmoids(Some(bias), Some(1.0)) {
                for (q, out) in q.iter().zip(&sigmoid.run(x)) {
                    let want = (f64::from(bias) + f64::from(*q)).exp();
                    let error = (f64::from(*out) - want).abs();
                    // Relative, down to the smallest normal numbers: the
                    // argument itself is rounded.
                    let allowed = 2f64.powi(-24) * (4.0 + f64::from(bias.abs())) * want;
                    assert!(error <= allowed, "{isa:?}, bias {bias}, score {q}: {out:e} instead of {want:e}");
                }
            }
        }
        // Far above it, 1.
        let q = Array4::from_elem((1, 1, q_len, 1), 50.0f32);
        for (isa, sigmoid) in sigmoids(Some(0.0), Some(2.0)) {
            let out = sigmoid.run(Qkv::new(q.view(), key.view(), key.view()));
            assert!(out.iter().all(|&x| x == 1.0), "{isa:?}: {out}");
        }
    }
}

#[test]
fn sigmoid_of_sharp_scores_stays_within_the_bound() {
    let mut ratio = Ratio::default();
    for dims in &WAYS {
        let x = Arrays::<f32>::normal(dims, 101);
        for (bias, scale) in [(None, 1.6), (Some(-3.0), -0.8), (Some(2.5), 8.0)] {
            let mechanisms = sigmoids(bias, Some(scale))
                .map(|(isa, sigmoid)| (isa, Box::new(sigmoid) as Box<dyn Mechanism<f32>>))
                .collect();
            let what = format!("sigmoid, bias {bias:?}, scale {scale}, {} queries", dims.q_len);
            ratio.join(holds(&what, &mechanisms, x.qkv()));
        }
    }
    ratio.report("sharp sigmoid, f32");
}

#[test]
fn masks_of_every_kind_divide_keys() {
    for dims in &WAYS {
        for (name, mask) in masks(dims) {
            let visible: Array4<bool> = mask.materialize(dims);
            let seen = visible.iter().filter(|&&seen| seen).count();
            assert!(seen < visible.len(), "{name}: hides nothing");
            assert_eq!(seen == 0, name == "nothing", "{name}: {seen} of {}", visible.len());
        }
    }
}
