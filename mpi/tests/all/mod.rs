//! The tests, each a collective call.

mod data;
mod parts;
mod refusals;
mod rows;
mod states;

use std::process::ExitCode;

use attention_kernels_mpi::Group;

/// A name and what all ranks do.
type Test = (&'static str, fn(&Group));

pub const TESTS: [Test; 26] = [
    ("ring_is_attention", rows::ring_is_attention),
    ("ring_of_halves_is_rounded_once", rows::ring_of_halves_is_rounded_once),
    ("ring_keeps_packed_sequences_apart", rows::ring_keeps_packed_sequences_apart),
    ("ring_gradients", rows::ring_gradients),
    ("arrival_does_not_matter", rows::arrival_does_not_matter),
    ("heads_are_attention", rows::heads_are_attention),
    ("heads_gradients", rows::heads_gradients),
    ("spread_cache_is_attention", rows::spread_cache_is_attention),
    ("the_baseline_and_the_others", rows::the_baseline_and_the_others),
    ("hybrid_layers", rows::hybrid_layers),
    ("states_of_decays", states::states_of_decays),
    ("states_of_delta_rules", states::states_of_delta_rules),
    ("packed_states", states::packed_states),
    ("unmasked_states", states::unmasked_states),
    ("state_gradients", states::state_gradients),
    ("states_of_parts", parts::states_of_parts),
    ("packed_parts", parts::packed_parts),
    ("padded_parts", parts::padded_parts),
    ("states_of_features", parts::states_of_features),
    ("bytes_of_parts", parts::bytes_of_parts),
    ("bytes_do_not_grow_with_length", states::bytes_do_not_grow_with_length),
    ("wrong_shapes_are_named_everywhere", refusals::wrong_shapes_are_named_everywhere),
    ("failures_are_named_everywhere", refusals::failures_are_named_everywhere),
    ("silent_ranks_are_named", refusals::silent_ranks_are_named),
    ("blocks_have_one_owner", refusals::blocks_have_one_owner),
    (STOPS, refusals::stops_within_a_message),
];

/// The test that ends the program, where there are several ranks.
pub const STOPS: &str = "stops_within_a_message";

/// Runs the test that the first argument names.
pub fn run() -> ExitCode {
    let Some(universe) = attention_kernels_mpi::mpi::initialize() else { return ExitCode::FAILURE };
    let name = std::env::args().nth(1);
    let Some((_, test)) = TESTS.iter().find(|(test, _)| Some(*test) == name.as_deref()) else {
        return ExitCode::FAILURE;
    };
    test(&Group::new(&universe.world()));
    ExitCode::SUCCESS
}
