//! The references are judged too: by values that were computed elsewhere, in
//! `f64` from the formulas, by identities, and by what papers print.

mod shared;

use std::f64::consts::FRAC_1_SQRT_2;

use attention_kernels::dense::{Dense, Tempered, position_temperature, token_temperature};
use attention_kernels::mask::{Boolean, Causal, Prefix, Tree, Unmasked, Window};
use attention_kernels::score::{Alibi, RelativeTable, Softcap};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Bounded, Mergeable, Weights};
use ndarray::{Array2, Array3, Array4, arr2, array};

use shared::{AnyScore, Case, isas, masked, scored, selective as selective_of, shape, sigmoid as sigmoid_of};

/// 2 query heads over 1 key/value head, 2 queries, 3 keys, dims 3 and 2.
/// Numbers that `f32` holds exactly.
fn small() -> Case {
    let q = vec![-1.0, 0.25, 1.5, -0.5, 0.75, -1.25, 0.0, 1.25, -0.75, 0.5, -1.5, -0.25];
    let k = vec![-1.0, 0.75, -0.25, -1.25, 0.5, -0.5, 1.25, 0.25, -0.75];
    let v = vec![-2.0, 1.0, -3.0, 0.0, 3.0, -1.0];
    Case {
        q: Array4::from_shape_vec((1, 2, 2, 3), q).unwrap(),
        k: Array4::from_shape_vec((1, 1, 3, 3), k).unwrap(),
        v: Array4::from_shape_vec((1, 1, 3, 2), v).unwrap(),
    }
}

#[track_caller]
fn close(what: &str, got: impl IntoIterator<Item = f64>, want: &[f64], tolerance: f64) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}: {a} at {i}, not {b}");
    }
}

/// The definition to 14 digits, the kernel to 6.
#[track_caller]
fn agrees<F: attention_kernels::score::Score + 'static>(
    what: &str,
    mechanism: &Dense<shared::AnyMask, F>,
    out: &[f64],
    lse: &[f64],
) {
    let case = small();
    close(what, mechanism.reference(case.x()).unwrap(), out, 3e-14);
    close(what, mechanism.reference_lse(case.x()).unwrap(), lse, 3e-14);
    let (kernel, kernel_lse) = mechanism.forward_with_lse(case.x()).unwrap();
    close(what, kernel.iter().map(|&x| x.into()), out, 2e-6);
    close(what, kernel_lse.iter().map(|&x| x.into()), lse, 2e-6);
}

const CAUSAL: [f64; 8] = [
    -2.47657965106368,
    0.523420348936324,
    -1.246042731969,
    0.127519741883605,
    -2.48438008427698,
    0.515619915723016,
    0.54169701643065,
    -0.351573788089137,
];
const CAUSAL_LSE: [f64; 4] = [1.05362041127668, 1.70951809285411, 1.22488538235778, 0.805410520935245];

#[test]
fn causal_grouped() {
    for isa in isas() {
        let mechanism = masked(isa, Causal::new()).scale(0.5).build().unwrap();
        agrees("causal", &mechanism, &CAUSAL, &CAUSAL_LSE);
        // The same keys, said in other ways.
        let visible = Box::leak(Box::new(arr2(&[[true, true, false], [true, true, true]])));
        let boolean = Boolean::new(visible.view().into_shape_with_order((1, 1, 2, 3)).unwrap());
        agrees("boolean", &masked(isa, boolean).scale(0.5).build().unwrap(), &CAUSAL, &CAUSAL_LSE);
        let prefix = masked(isa, Prefix::new(1)).scale(0.5).build().unwrap();
        agrees("prefix", &prefix, &CAUSAL, &CAUSAL_LSE);
        let tree = Tree::new(&[None, Some(0)]).unwrap();
        agrees("tree", &masked(isa, tree).scale(0.5).build().unwrap(), &CAUSAL, &CAUSAL_LSE);
    }
}

#[test]
fn default_scale() {
    let out = [
        -2.03607465149586,
        0.405138616222144,
        -1.32514356283566,
        0.143766354873605,
        -0.784820850735884,
        0.0480708051647474,
        0.730999922308941,
        -0.404609145408629,
    ];
    let lse = [1.19277504666744, 1.80860532984808, 1.67769791601479, 0.778866278497533];
    for isa in isas() {
        agrees("1 / sqrt 3", &masked(isa, Unmasked).build().unwrap(), &out, &lse);
    }
}

#[test]
fn window() {
    let out = [
        -2.47657965106368,
        0.523420348936324,
        -0.822184766882299,
        -0.362969205519617,
        -2.48438008427698,
        0.515619915723016,
        1.19552652635255,
        -0.699254421058758,
    ];
    let lse = [1.05362041127668, 1.26343728159512, 1.22488538235778, 0.576490624347644];
    for isa in isas() {
        let mechanism = masked(isa, Window::new(Some(1), Some(0))).scale(0.5).build().unwrap();
        agrees("window", &mechanism, &out, &lse);
    }
}

#[test]
fn sinks() {
    let out = [
        -1.42484392600504,
        0.301138025021342,
        -0.900920431198667,
        0.0922000007676931,
        -2.33153903665857,
        0.483898566566026,
        0.49257817674221,
        -0.319694534535931,
    ];
    for isa in isas() {
        let mechanism = masked(isa, Causal::new()).scale(0.5).sinks([0.75, -1.5]).build().unwrap();
        agrees("sinks", &mechanism, &out, &CAUSAL_LSE);
    }
}

#[test]
fn alibi() {
    let out = [
        -2.4921881357208,
        0.507811864279204,
        -1.16542664359419,
        0.0913541357052,
        -2.48535575201324,
        0.514644247986764,
        0.54906565551473,
        -0.354060011767663,
    ];
    let lse = [1.02139424590572, 1.64017661836606, 1.22287314762548, 0.802882463762461];
    for isa in isas() {
        let score = AnyScore::Alibi(Alibi::new(2));
        agrees("alibi", &scored(isa, Causal::new(), score).scale(0.5).build().unwrap(), &out, &lse);
    }
}

#[test]
fn softcap() {
    let out = [
        -2.4812344496629,
        0.518765550337096,
        -1.05403714739938,
        0.0933455759177257,
        -2.49018263557723,
        0.509817364422766,
        0.333032263452968,
        -0.28374541006704,
    ];
    let lse = [1.02698963223908, 1.57044531876853, 1.15006444066553, 0.873077732701903];
    for isa in isas() {
        let score = AnyScore::Softcap(Softcap::new(0.75).unwrap());
        agrees("softcap", &scored(isa, Causal::new(), score).scale(0.5).build().unwrap(), &out, &lse);
    }
}

#[test]
fn bias() {
    let out = [
        -0.463209915673681,
        0.385283966269472,
        -2.54206113685161,
        -0.018257672532352,
        1.25677432333027,
        -0.302709729332108,
        -1.58131802159108,
        -0.189859885906937,
    ];
    let lse = [1.27349203213893, 2.9378347689361, 2.11620067827652, 1.68933205476772];
    let bias = array![[[[0.5, f32::NEG_INFINITY, 1.25], [-0.75, 2.0, 0.0]]]];
    for isa in isas() {
        let score = AnyScore::bias(bias.clone());
        agrees("bias", &scored(isa, Unmasked, score).scale(0.5).build().unwrap(), &out, &lse);
    }
}

#[test]
fn relative_table() {
    let out = [
        -2.03463125459089,
        0.545633876570291,
        -1.6732831577795,
        0.240971735902682,
        -0.854686224872617,
        0.422818824703652,
        -1.73579845571325,
        0.249160853457032,
    ];
    let lse = [1.40779218076095, 2.11364366382326, 1.96463635669313, 1.14973144787772];
    let table: Array2<f32> = arr2(&[[0.5, 0.0, -0.25], [1.0, -1.0, 0.125]]);
    for isa in isas() {
        let score = AnyScore::Table(RelativeTable::new(table.clone()).unwrap());
        agrees("table", &scored(isa, Unmasked, score).scale(0.5).build().unwrap(), &out, &lse);
    }
}

#[test]
fn sigmoid() {
    let default = [
        -1.60602768931566,
        0.333507776564632,
        -1.18498648782058,
        0.098921402560992,
        -1.80216858427733,
        0.36909242555,
        0.160590177501764,
        -0.160801624740507,
    ];
    let fixed = [
        -2.36462393728136,
        0.37064968480063,
        -1.79931481737359,
        0.0961350613690015,
        -1.42658838755521,
        0.0272314243879221,
        -0.117187418780764,
        -0.24486246292048,
    ];
    let case = small();
    for isa in isas() {
        let causal = sigmoid_of(isa, Causal::new()).scale(0.5).build().unwrap();
        close("sigmoid", causal.reference(case.x()).unwrap(), &default, 3e-14);
        close("sigmoid", causal.forward(case.x()).unwrap().mapv(f64::from), &default, 2e-6);
        let biased = sigmoid_of(isa, Unmasked).bias(0.25).scale(0.5).build().unwrap();
        close("sigmoid", biased.reference(case.x()).unwrap(), &fixed, 3e-14);
        close("sigmoid", biased.forward(case.x()).unwrap().mapv(f64::from), &fixed, 2e-6);
    }
}

#[test]
fn selective() {
    let out = [
        -2.77929151176041,
        1.02343320940833,
        -2.65713560936938,
        0.894839965241252,
        -2.80855087234081,
        1.04684069787265,
        -2.83333333333333,
        1.0,
    ];
    let lse = [0.873109313621044, 2.36858039914245, 1.49112041127668, 1.09861228866811];
    let case = small();
    let (query, value) = (array![[[0.5, 2.0], [1.5, 0.0]]], array![[[2.0, 0.5, -1.0]]]);
    let x = Tempered { qkv: case.x(), query: query.view(), value: value.view() };
    for isa in isas() {
        let mechanism = selective_of(isa, Causal::new()).scale(0.5).build().unwrap();
        close("selective", mechanism.reference(x).unwrap(), &out, 3e-14);
        let (kernel, kernel_lse) = mechanism.forward_with_lse(x).unwrap();
        close("selective", kernel.mapv(f64::from), &out, 3e-6);
        close("selective", kernel_lse.mapv(f64::from), &lse, 2e-6);
    }
    assert!((f64::from(token_temperature(0.3, -0.4, 7)) - 2.072230367579906).abs() < 3e-7);
    assert!((f64::from(position_temperature(1.5, 9)) - 1.0248600281101663).abs() < 2e-7);
    // The first token has only its feature, whatever alpha and beta are.
    assert_eq!(token_temperature(0.0, 3.0, 1), 1.0);
    assert_eq!(position_temperature(2.0, 1), 1.0);
}

/// Slopes as the paper prints them: 8 heads 1/2 .. 1/256; 16 heads start at
/// 2^-0.5; 12 heads are those of 8 and every other one of 16.
#[test]
fn published_slopes() {
    let eight = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625];
    assert_eq!(Alibi::new(8).slopes(), eight);
    let twelve = Alibi::new(12);
    assert_eq!(twelve.slopes()[..8], eight);
    let more = [FRAC_1_SQRT_2, 0.3535533905932738, 0.1767766952966369, 0.08838834764831845];
    close("12 heads", twelve.slopes()[8..].iter().map(|&x| x.into()), &more, 5e-8);
    let sixteen = Alibi::new(16);
    assert_eq!(sixteen.slopes().len(), 16);
    for (h, pair) in sixteen.slopes().chunks(2).enumerate() {
        let odd = 2f64.powf(-0.5 - h as f64);
        close("16 heads", [pair[0].into(), pair[1].into()], &[odd, eight[h].into()], 5e-8);
    }
    assert_eq!(Alibi::new(1).slopes(), [0.00390625]);
    assert_eq!(Alibi::new(0).slopes(), []);
}

/// Scores that are all equal: a mean, and the logarithm of how many there are.
#[test]
fn equal_scores_give_means() {
    for (isa, q_len) in isas().into_iter().flat_map(|isa| [(isa, 2), (isa, 30)]) {
        let mut case = Case::new(shape([1, 2, 1, q_len, 37, 16, 5]), 5);
        case.q.fill(0.0);
        let dense = masked(isa, Causal::new()).build().unwrap();
        let (out, lse) = dense.forward_with_lse(case.x()).unwrap();
        let (reference, reference_lse) =
            (dense.reference(case.x()).unwrap(), dense.reference_lse(case.x()).unwrap());
        for ((b, h, i, c), &x) in reference.indexed_iter() {
            let n = 37 - q_len + i + 1;
            let mean = (0..n).map(|j| f64::from(case.v[[b, 0, j, c]])).sum::<f64>() / n as f64;
            close("mean", [x], &[mean], 1e-14);
            close("mean", [out[[b, h, i, c]].into()], &[mean], 1e-6);
            close("ln n", [reference_lse[[b, h, i]]], &[(n as f64).ln()], 1e-14);
            close("ln n", [lse[[b, h, i]].into()], &[(n as f64).ln()], 1e-6);
        }
    }
}

/// With identity keys the weights are the softmax of the queries, and with
/// identity values they are the output.
#[test]
fn identity_keys_and_values() {
    let n = 24;
    let eye = Array4::from_shape_fn((1, 1, n, n), |(_, _, i, j)| f32::from(u8::from(i == j)));
    for (isa, q_len) in isas().into_iter().flat_map(|isa| [(isa, 3), (isa, 40)]) {
        let case = Case {
            q: shared::normals(3, (1, 1, q_len, n)).mapv(|x| 3.0 * x),
            k: eye.clone(),
            v: eye.clone(),
        };
        let dense = masked(isa, Unmasked).scale(1.0).build().unwrap();
        let (out, weights) = (dense.forward(case.x()).unwrap(), dense.weights(case.x()).unwrap());
        let reference = dense.reference(case.x()).unwrap();
        for i in 0..q_len {
            let row: Vec<f64> = (0..n).map(|j| f64::from(case.q[[0, 0, i, j]])).collect();
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            let softmax: Vec<f64> = row.iter().map(|x| x.exp() / sum).collect();
            let row = |x: &Array4<f32>| (0..n).map(|j| x[[0, 0, i, j]].into()).collect::<Vec<f64>>();
            close("reference", (0..n).map(|j| reference[[0, 0, i, j]]), &softmax, 1e-14);
            close("output", row(&out), &softmax, 1e-6);
            close("weights", row(&weights), &softmax, 1e-6);
            close("sum", [row(&weights).iter().sum()], &[1.0], 2e-6);
        }
    }
}

/// A score so far ahead that nothing else counts: the output is its value.
#[test]
fn the_winner_takes_all() {
    for (isa, q_len) in isas().into_iter().flat_map(|isa| [(isa, 1), (isa, 50)]) {
        let mut case = Case::new(shape([1, 1, 1, q_len, 300, 64, 9]), 8);
        for i in 0..q_len {
            let winner = (i * 97 + 5) % 300;
            let key = case.k.slice(ndarray::s![0, 0, winner, ..]).mapv(|x| 200.0 * x);
            case.q.slice_mut(ndarray::s![0, 0, i, ..]).assign(&key);
        }
        let out = masked(isa, Unmasked).build().unwrap().forward(case.x()).unwrap();
        for ((_, _, i, c), &x) in out.indexed_iter() {
            let winner = case.v[[0, 0, (i * 97 + 5) % 300, c]];
            assert!((x - winner).abs() <= 2e-6, "{isa}: {x} at {i}, not {winner}");
        }
    }
}

/// What costs are: 2 flops a multiply-add of a visible pair.
#[test]
fn costs() {
    let case = Case::new(shape([2, 4, 2, 10, 30, 8, 6]), 1);
    let cost = |mechanism: &Dense<shared::AnyMask>| mechanism.cost(case.x()).unwrap();
    let all = cost(&masked(Isa::Scalar, Unmasked).build().unwrap());
    assert_eq!(all.flops, 2 * (8 + 6) * (2 * 4 * 10 * 30));
    // q, out, k, v
    assert_eq!(all.bytes, 4 * (2 * 4 * 10 * 8 + 2 * 4 * 10 * 6 + 2 * 2 * 30 * 8 + 2 * 2 * 30 * 6));
    let causal = cost(&masked(Isa::Scalar, Causal::new()).build().unwrap());
    let pairs: u64 = (21..=30).sum();
    assert_eq!(causal.flops, 2 * (8 + 6) * 2 * 4 * pairs);
    let none: Case = Case {
        q: Array4::zeros((0, 4, 10, 8)),
        k: Array4::zeros((0, 2, 3, 8)),
        v: Array4::zeros((0, 2, 3, 6)),
    };
    assert_eq!(masked(Isa::Scalar, Unmasked).build().unwrap().cost(none.x()).unwrap().flops, 0);
    let _: Array3<f64> = masked(Isa::Scalar, Unmasked).build().unwrap().error_bound(case.x()).unwrap();
}
