//! What is wrong on one rank is an error on all of them.

use std::time::{Duration, Instant};

use attention_kernels::linear::Lightning;
use attention_kernels::{Attention, Card, Cost, Mechanism, Qkv, Workspace, dense::Dense};
use attention_kernels_mpi::lasp::{self, Transition};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::ring::Ring;
use attention_kernels_mpi::{Error, Group, heads, spread};

use ndarray::{Array4, ArrayViewMut4};

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

/// What a rank finds out in the middle of a call is told to all at its end.
pub fn failures_are_named_everywhere(group: &Group) {
    let (me, ranks) = (group.rank(), group.size());
    let lightning = Lightning::builder(2).build().unwrap();
    let good = numbers(1, (1, 2, 10, 8));
    let cut = Cut::even(10 * ranks, ranks);
    for wrong in 0..ranks {
        let error = |got: Error, argument: &str| match got {
            Error::Argument { rank, message } => {
                assert_eq!(rank, wrong, "{message}");
                assert!(message.starts_with(argument), "{message}");
            }
            other => panic!("{other}"),
        };
        let mut x = good.clone();
        if me == wrong {
            x[[0, 1, 3, 2]] = f32::NAN;
        }
        let qkv = Qkv::new(good.view(), x.view(), good.view());
        let got = lasp::forward(group, &lightning, qkv, Transition::Rows).unwrap_err();
        error(got, "x: expected tokens");
        // A mechanism that refuses what one rank gives it.
        let refuses = Except(|| match me == wrong {
            true => Dense::builder().scale(f32::NAN).build().map(|_| ()),
            false => Ok(()),
        });
        // Of as many heads as ranks, so that each has one.
        let x = numbers(1, (1, ranks, 10, 8));
        let got = heads::forward(group, &refuses, &cut, x.view(), x.view(), x.view());
        error(got.unwrap_err(), "scale: expected");
        // The group goes on.
        lasp::forward(group, &lightning, Qkv::new(good.view(), good.view(), good.view()), Transition::Rows)
            .unwrap();
    }
}

/// Dense attention on all ranks but those that do something else first.
struct Except<F>(F);

impl<F: Fn() -> attention_kernels::Result<()> + Send + Sync> Mechanism for Except<F> {
    fn card(&self) -> &'static Card {
        Dense::builder().build().unwrap().card()
    }
}

impl<'a, F: Fn() -> attention_kernels::Result<()> + Send + Sync> Attention<Qkv<'a, f32, f32, f32>>
    for Except<F>
{
    fn workspace_bytes(&self, _: Qkv<'a, f32>) -> attention_kernels::Result<usize> {
        Ok(0)
    }

    fn forward_into(
        &self,
        x: Qkv<'a, f32>,
        out: ArrayViewMut4<'_, f32>,
        workspace: &mut Workspace,
    ) -> attention_kernels::Result<()> {
        self.0()?;
        Dense::builder().build()?.forward_into(x, out, workspace)
    }

    fn reference(&self, x: Qkv<'a, f32>) -> attention_kernels::Result<Array4<f64>> {
        Dense::builder().build()?.reference(x)
    }

    fn cost(&self, x: Qkv<'a, f32>) -> attention_kernels::Result<Cost> {
        Dense::builder().build()?.cost(x)
    }
}

pub fn blocks_have_one_owner(group: &Group) {
    let named = |owned: &[Vec<usize>], rank: usize, message: &str| {
        let message = message.to_owned();
        assert_eq!(spread::check_owners(owned, 4), Err(Error::Argument { rank, message }));
    };
    spread::check_owners(&[vec![0, 3], vec![], vec![2, 1]], 4).unwrap();
    spread::check_owners(&[], 0).unwrap();
    named(&[vec![0, 1], vec![2, 1, 3]], 1, "owned: expected block 1 with one rank, got also rank 0");
    named(&[vec![0, 1, 2, 0], vec![3]], 0, "owned: expected block 0 with one rank, got also rank 0");
    named(&[vec![0, 1], vec![2, 4]], 1, "owned: expected blocks below 4, got 4");
    named(&[vec![0, 1], vec![3]], 0, "owned: expected block 2 with a rank, got none");
    // Rows that are handed over, and who may do so.
    let (me, ranks) = (group.rank(), group.size());
    for from in 0..ranks {
        let to = (from + 1) % ranks;
        let rows = numbers(from, (2, 1, 3, 4));
        let got = spread::hand(group, from, to, (me == from).then(|| rows.view())).unwrap();
        assert_eq!(got, (me == to).then_some(rows));
        let nobody = spread::hand::<f32>(group, from, to, None).unwrap_err();
        let message = format!("rows: expected rows from rank {from} alone, got none");
        assert_eq!(nobody, Error::Argument { rank: from, message });
    }
    let message = format!("from: expected two of {ranks} ranks, got 0 and {ranks}");
    let beyond = spread::hand::<f32>(group, 0, ranks, None).unwrap_err();
    assert_eq!(beyond, Error::Argument { rank: 0, message });
}

/// Ends the program: the last rank comes to the call and then stops in it.
pub fn stops_within_a_message(group: &Group) {
    let world = attention_kernels_mpi::mpi::topology::SimpleCommunicator::world();
    let impatient = Group::new(&world).with_patience(Duration::from_millis(500));
    let x = numbers(1, (1, group.size(), 10, 8));
    let sleeps = group.size() > 1 && group.rank() + 1 == group.size();
    let stops = Except(move || {
        std::thread::sleep(if sleeps { Duration::from_secs(60) } else { Duration::ZERO });
        Ok(())
    });
    let cut = Cut::even(10 * group.size(), group.size());
    let _ = heads::forward(&impatient, &stops, &cut, x.view(), x.view(), x.view());
}
