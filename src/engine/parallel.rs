//! How work is cut for threads: the one place that knows of rayon.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that [`for_each`] runs on when called from here.
pub(crate) fn threads() -> usize {
    #[cfg(feature = "rayon")]
    {
        rayon::current_num_threads()
    }
    #[cfg(not(feature = "rayon"))]
    {
        1
    }
}

/// Nanoseconds of work that a thread is woken for: handing it over costs about
/// as much.
const WORTH: usize = 8_000;

/// Threads that work of about so many nanoseconds on one of them is worth: at
/// most those that [`for_each`] runs on.
pub(crate) fn threads_for(nanoseconds: usize) -> usize {
    (nanoseconds / WORTH).clamp(1, threads())
}

/// Runs `work`, which calls the functions here several times for so many
/// workers, on a thread of the pool, so that it is handed over once.
pub(crate) fn enter<R: Send>(workers: usize, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "rayon")]
    if workers > 1 && rayon::current_thread_index().is_none() {
        return rayon::scope(|_| work());
    }
    let _ = workers;
    work()
}

/// Runs on that many threads.
#[cfg(test)]
pub(crate) fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "rayon")]
    {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }
    #[cfg(not(feature = "rayon"))]
    {
        assert!(threads > 0);
        work()
    }
}

/// Calls both, at the same time where there are threads for it.
pub(crate) fn both<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    #[cfg(feature = "rayon")]
    {
        rayon::join(a, b)
    }
    #[cfg(not(feature = "rayon"))]
    {
        (a(), b())
    }
}

/// Calls `work` once for each of `workers`, at the same time where there are
/// threads for it.
pub(crate) fn each_worker(workers: usize, work: impl Fn(usize) + Sync + Send) {
    #[cfg(feature = "rayon")]
    if workers > 1 {
        use rayon::prelude::*;
        (0..workers).into_par_iter().with_max_len(1).for_each(work);
        return;
    }
    (0..workers).for_each(work);
}

/// Shares tasks `0..tasks` out to `workers`, in order: whoever is free takes
/// the next one. Each worker makes what it works in once, with `start`.
pub(crate) fn for_each<W>(
    workers: usize,
    tasks: usize,
    start: impl Fn(usize) -> W + Sync + Send,
    work: impl Fn(&mut W, usize) + Sync + Send,
) {
    let next = AtomicUsize::new(0);
    each_worker(workers.min(tasks), |worker| {
        let mut state = start(worker);
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            work(&mut state, task);
        }
    });
}

/// [`for_each`], where each worker takes its next task before it works on one,
/// so that it can prefetch the memory of that; `work` gets both. For tasks of
/// similar size.
pub(crate) fn for_each_ahead<W>(
    workers: usize,
    tasks: usize,
    start: impl Fn(usize) -> W + Sync + Send,
    work: impl Fn(&mut W, usize, Option<usize>) + Sync + Send,
) {
    let workers = workers.min(tasks);
    let next = AtomicUsize::new(workers);
    each_worker(workers, |worker| {
        let mut state = start(worker);
        let mut task = worker;
        while task < tasks {
            let following = next.fetch_add(1, Ordering::Relaxed);
            work(&mut state, task, (following < tasks).then_some(following));
            task = following;
        }
    });
}
