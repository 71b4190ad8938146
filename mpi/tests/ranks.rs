//! All ways to cut a sequence, on 1, 2, 3, 4 and 7 ranks, against the kernels of one process.
//!
//! Run alone this starts itself under `mpirun` for each number of ranks.

mod all;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const RANKS: [usize; 5] = [1, 2, 3, 4, 7];

fn main() -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
        return all::run();
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        all::TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filter = arguments.into_iter().find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let (mut passed, mut failed) = (0, 0);
    for ranks in RANKS {
        for (name, _) in all::TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
            let good = if *name == all::STOPS && ranks > 1 { stops(ranks) } else { start(ranks, name) };
            println!("test {name} on {ranks} ranks ... {}", if good { "ok" } else { "FAILED" });
            *(if good { &mut passed } else { &mut failed }) += 1;
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One test under `mpirun` on loopback.
fn start(ranks: usize, name: &str) -> bool {
    command(ranks, name).is_some_and(|mut command| command.status().is_ok_and(|status| status.success()))
}

/// Whether the program has ended soon, and said which rank has stopped: the last one, or
/// another that waits for it.
fn stops(ranks: usize) -> bool {
    let since = Instant::now();
    let Some(Ok(output)) = command(ranks, all::STOPS).map(|mut command| command.output()) else {
        return false;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    let named =
        (1..ranks).any(|rank| said.contains(&format!("rank {rank}: stopped within a message for 500ms")));
    !output.status.success() && named && since.elapsed() < Duration::from_secs(30)
}

fn command(ranks: usize, name: &str) -> Option<Command> {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--allow-run-as-root", "--timeout", "300"])
        .args(["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"])
        .args(["-x", "RAYON_NUM_THREADS=1", "-n", &ranks.to_string()])
        .arg(std::env::current_exe().ok()?)
        .arg(name);
    Some(command)
}
