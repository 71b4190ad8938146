//! What is wrong on one rank is an error on all of them.

use std::time::{Duration, Instant};

use attention_kernels::linear::Lightning;
use attention_kernels::{Qkv, dense::Dense};
use attention_kernels_mpi::lasp::{self, Transition};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::ring::Ring;
use attention_kernels_mpi::{Error, Group, heads, spread};

use super::data::numbers;

pub fn wrong_shapes_are_named_everywhere(group: &Group) {
    let (me, ranks) = (group.rank(), group.size());
    let cut = Cut::even(10 * ranks, ranks);
    let named = |error: Error, rank: usize, argument: &str| match error {
        Error::Argument { rank: got, message } => {
            assert_eq!(got, rank, "{message}");
            assert!(message.starts_with(argument), "{message}");
        }
        other => panic!("{other}"),
    };
    let good = numbers(1, (1, 2, 10, 8));
    for wrong in 0..ranks {
        let bad = me == wrong;
        let x = if bad { numbers(1, (1, 2, 9, 8)) } else { good.clone() };
        let ring = Ring::new(cut.clone()).causal();
        named(
            ring.forward(group, good.view(), good.view(), x.view()).unwrap_err(),
            wrong,
            "v: expected len 10",
        );
        named(
            ring.forward(group, good.view(), x.view(), good.view()).unwrap_err(),
            wrong,
            "k: expected len 10",
        );
        let dense = Dense::builder().build().unwrap();
        named(
            heads::forward(group, &dense, &cut, x.view(), good.view(), good.view()).unwrap_err(),
            wrong,
            "q: expected len 10",
        );
        // Shapes that go together on each rank, but not with those of the others.
        let x = if bad { numbers(1, (1, 2, 10, 6)) } else { good.clone() };
        let at = if wrong == 0 { 1 } else { wrong };
        let lightning = Lightning::builder(2).build().unwrap();
        if ranks > 1 {
            let got = ring.forward(group, x.view(), x.view(), good.view()).unwrap_err();
            named(got, at, "k: head_dim: expected");
            let qkv = Qkv::new(good.view(), good.view(), x.view());
            let got = lasp::forward(group, &lightning, qkv, Transition::Rows).unwrap_err();
            named(got, at, "v: value_dim: expected");
        }
        let heads = if bad { 3 } else { 2 };
        let x = numbers(1, (1, heads, 10, 8));
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        named(
            lasp::forward(group, &lightning, qkv, Transition::Rows).unwrap_err(),
            wrong,
            "slopes: expected",
        );
        let q = (me == wrong).then(|| numbers(1, (1, 5, 1, 8)));
        let q = q.as_ref().map(|q| q.view());
        let got = spread::attend(group, wrong, q, good.view(), good.view(), None).unwrap_err();
        named(got, wrong, "q: expected a number of heads");
        // The group goes on.
        ring.forward(group, good.view(), good.view(), good.view()).unwrap();
    }
}

pub fn silent_ranks_are_named(group: &Group) {
    let world = attention_kernels_mpi::mpi::topology::SimpleCommunicator::world();
    let (patience, last) = (Duration::from_millis(500), group.size() - 1);
    let impatient = Group::new(&world).with_patience(patience);
    let x = numbers(1, (1, 2, 10, 8));
    let ring = Ring::new(Cut::even(10 * group.size(), group.size()));
    if group.size() == 1 {
        ring.forward(&impatient, x.view(), x.view(), x.view()).unwrap();
    } else if group.rank() != last {
        let since = Instant::now();
        let got = ring.forward(&impatient, x.view(), x.view(), x.view()).unwrap_err();
        assert_eq!(got, Error::Silent { rank: last, call: "ring forward", patience });
        assert!(since.elapsed() < 20 * patience, "{:?}", since.elapsed());
        let got = ring.forward(&impatient, x.view(), x.view(), x.view()).unwrap_err();
        assert_eq!(got, Error::Lost { rank: last });
    }
    // The other group has all of them still.
    ring.forward(group, x.view(), x.view(), x.view()).unwrap();
}
