use ndarray::Axis;

use super::*;
use crate::attention::{Attention, Selects};
use crate::cache::{Append, Cached, Contiguous, KvShape};
use crate::sparse::testing::{self, Arrays};

fn flex(gamma: f64, tau: f64) -> FlexPrefill {
    FlexPrefill::builder().block(64).least(64).gamma(gamma).tau(tau).build().unwrap()
}

#[test]
fn identities() {
    for tau in [0.0, 1.0] {
        testing::all_keys_are_dense(&flex(1.0 + 1e-6, tau), true);
        testing::kept_mass_bounds_the_error(&flex(0.2, tau), true);
        testing::caches_are_arrays(&flex(0.2, tau));
        testing::heads_permute(&flex(0.2, tau));
    }
}

fn atoms(flex: &FlexPrefill, x: &Arrays) -> Vec<(usize, usize, u32)> {
    let index = flex.select(x.qkv()).unwrap();
    let (want, margins) = flex.reference_select(x.qkv()).unwrap();
    let difference = <FlexPrefill as Selects<Qkv<'_, f32>>>::difference(&index, &want, &margins);
    assert_eq!(difference, None, "{flex:?}");
    let layout = *index.layout();
    let lists = (0..layout.q_heads).flat_map(|h| (0..layout.blocks()).map(move |i| (h, i)));
    lists.flat_map(|(h, i)| index.atoms(0, h, i).iter().map(move |&atom| (h, i, atom))).collect()
}

/// Of either kind of heads, and of a prompt whose first blocks are known.
#[test]
fn selections_are_the_definition_s_and_grow_with_gamma() {
    for (sizes, before) in [([1, 4, 2, 1000, 1000, 16, 8], 0), ([1, 2, 1, 500, 820, 16, 8], 5)] {
        let x = Arrays::normal(sizes, 1);
        for tau in [0.0, 1.0] {
            let mut smaller = Vec::new();
            for gamma in [0.02, 0.2, 0.6, 1.1] {
                let found = atoms(&flex(gamma, tau), &x);
                assert!(smaller.iter().all(|x| found.contains(x)), "{gamma}");
                assert!(gamma > 1.0 || found.len() > smaller.len());
                smaller = found;
            }
            let blocks = sizes[3].div_ceil(64);
            assert_eq!(smaller.len(), sizes[1] * (0..blocks).map(|i| before + i + 1).sum::<usize>());
        }
    }
}

#[test]
fn sinks_and_neighbours_are_always_seen() {
    let x = Arrays::normal([1, 2, 1, 640, 640, 16, 8], 2);
    let found = atoms(&flex(1e-9, 0.0), &x);
    assert!((0..10).all(|i| found.contains(&(0, i, 0)) && found.contains(&(1, i, i as u32))));
    assert_eq!(found.len(), 2 * 19);
}

#[test]
fn short_prompts_and_decoding_are_dense() {
    let full = FlexPrefill::builder().block(64).gamma(1e-9).least(1000).build().unwrap();
    let x = Arrays::normal([1, 2, 1, 960, 960, 16, 8], 3);
    assert_eq!(atoms(&full, &x).len(), 2 * 15 * 16 / 2);
    let x = Arrays::normal([1, 2, 1, 1, 960, 16, 8], 3);
    assert_eq!(atoms(&flex(1e-9, 0.0), &x).len(), 2 * 15);
}

#[test]
fn a_cache_is_the_arrays() {
    let x = Arrays::normal([1, 4, 2, 400, 400, 16, 8], 4);
    let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 8 };
    let mut cache = Contiguous::<f32>::new(shape, 1, 400).unwrap();
    cache.append(0, x.k.index_axis(Axis(0), 0), x.v.index_axis(Axis(0), 0)).unwrap();
    let flex = flex(0.3, 0.1);
    assert_eq!(flex.forward(Cached::new(x.q.view(), &cache)).unwrap(), flex.forward(x.qkv()).unwrap());
}

#[test]
fn refusals() {
    let refusal = |builder: FlexPrefillBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(FlexPrefill::builder().gamma(0.0)), "gamma: expected a share above 0, got 0");
    assert_eq!(refusal(FlexPrefill::builder().tau(-1.0)), "tau: expected at least 0, got -1");
    let block = refusal(FlexPrefill::builder().block(96));
    assert_eq!(block, "block: expected a multiple of 64 tokens, got 96");
}
