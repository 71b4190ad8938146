//! Kernels allocate nothing beyond their workspace, and ask for exactly what
//! they say.

mod shared;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use attention_kernels::catalog::{Catalogued, ENTRIES, Entry, Trial};
use attention_kernels::dense::Dense;
use attention_kernels::mask::{Documents, Mask, Window};
use attention_kernels::{Attention, Mergeable, Workspace};
use half::{bf16, f16};
use ndarray::{Array3, Array4};

use shared::{Case, Shape, shape};

/// Counts the allocations of threads that have a counter.
struct Counting;

thread_local! {
    static COUNTER: Cell<Option<&'static AtomicUsize>> = const { Cell::new(None) };
}

fn count() {
    if let Some(counter) = COUNTER.get() {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator, called with what came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Threads to run on, whose allocations are counted.
struct Threads {
    counter: &'static AtomicUsize,
    #[cfg(feature = "rayon")]
    pool: rayon::ThreadPool,
}

impl Threads {
    fn new(_threads: usize) -> Self {
        let counter: &'static AtomicUsize = Box::leak(Box::new(AtomicUsize::new(0)));
        #[cfg(feature = "rayon")]
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(_threads)
            .start_handler(move |_| COUNTER.set(Some(counter)))
            .build()
            .unwrap();
        Self {
            counter,
            #[cfg(feature = "rayon")]
            pool,
        }
    }

    /// Runs `work` on one of the threads.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        #[cfg(feature = "rayon")]
        return self.pool.install(work);
        #[cfg(not(feature = "rayon"))]
        {
            COUNTER.set(Some(self.counter));
            let result = work();
            COUNTER.set(None);
            result
        }
    }

    /// How often any of them allocated during `work`, which starts and ends
    /// on one of them.
    fn allocations(&self, work: impl FnOnce() + Send) -> usize {
        self.run(|| {
            let before = self.counter.load(Ordering::SeqCst);
            work();
            self.counter.load(Ordering::SeqCst) - before
        })
    }
}

fn thread_counts() -> &'static [usize] {
    if cfg!(feature = "rayon") { &[1, 2] } else { &[1] }
}

/// Sizes that take each way through the engines.
const WAYS: [(&str, Shape); 8] = [
    ("few queries", shape([2, 4, 2, 3, 1200, 32, 24])),
    ("more queries against many keys", shape([2, 2, 1, 30, 1300, 20, 12])),
    ("many small heads", shape([3, 6, 3, 60, 70, 32, 24])),
    ("one head", shape([1, 2, 1, 70, 200, 32, 24])),
    ("one large head", shape([1, 2, 1, 80, 1300, 64, 64])),
    ("odd sizes", shape([1, 3, 1, 13, 259, 5, 1])),
    ("tokens", shape([2, 4, 2, 70, 70, 20, 12])),
    ("tokens of one head", shape([1, 1, 1, 330, 330, 16, 20])),
];

#[test]
fn the_counter_counts() {
    for &n in thread_counts() {
        let threads = Threads::new(n);
        assert_eq!(threads.allocations(|| ()), 0);
        assert_eq!(threads.allocations(|| drop(std::hint::black_box(Box::new(5)))), 1);
        assert_eq!(threads.allocations(|| drop(std::hint::black_box(vec![String::from("x")]))), 2);
    }
}

fn check<T: Catalogued>(threads: &Threads, trial: &dyn Trial<T>, out: &mut Array4<T>, what: &str) {
    // What it says it needs is what it takes.
    let bytes = threads.run(|| trial.workspace_bytes()).unwrap();
    let mut workspace = Workspace::with_capacity(bytes);
    let capacity = workspace.capacity();
    let count = threads.allocations(|| trial.forward_into(out.view_mut(), &mut workspace).unwrap());
    assert_eq!(count, 0, "{what}: allocations of the first call with a workspace made to measure");
    assert_eq!(workspace.capacity(), capacity, "{what}: the workspace grew");

    // A workspace that had to grow grew to the same, in one allocation.
    let mut grown = Workspace::new();
    let count = threads.allocations(|| trial.forward_into(out.view_mut(), &mut grown).unwrap());
    assert_eq!(count, usize::from(bytes > 0), "{what}: allocations of the first call");
    assert_eq!(grown.capacity(), capacity, "{what}: more was asked for than it takes");

    // And then nothing more.
    for workspace in [&mut workspace, &mut grown] {
        let count = threads.allocations(|| {
            for _ in 0..3 {
                trial.forward_into(out.view_mut(), workspace).unwrap();
            }
        });
        assert_eq!(count, 0, "{what}: allocations of later calls");
        assert_eq!(workspace.capacity(), capacity, "{what}");
    }
}

fn check_all<T: Catalogued>(convert: impl Fn(f32) -> T + Copy) {
    for &n in thread_counts() {
        let threads = Threads::new(n);
        for (way, n) in WAYS {
            let case = Case::new(n, 4).map(convert);
            let mut out = Array4::from_elem((n.batch, n.q_heads, n.q_len, n.value_dim), T::default());
            // rayon's threads get what they keep for themselves.
            warm_up(&threads);
            // A selection is allocated.
            let fits = |entry: &&Entry| !entry.selects && (!entry.tokens || n.q_len == n.kv_len);
            for entry in ENTRIES.iter().filter(fits) {
                let trial = entry.trial(case.x(), None, 9).unwrap();
                check(&threads, &*trial, &mut out, &format!("{}, {way}", entry.card.name));
            }
        }
    }
}

/// Lets the threads of a pool steal from one another for the first time.
fn warm_up(threads: &Threads) {
    let case = Case::new(shape([4, 4, 4, 40, 64, 16, 16]), 1);
    let dense = Dense::builder().build().unwrap();
    threads.run(|| {
        for _ in 0..20 {
            dense.forward(case.x()).unwrap();
        }
    });
}

#[test]
fn every_entry_f32() {
    check_all::<f32>(|x| x);
}

#[test]
fn every_entry_f16() {
    check_all(f16::from_f32);
}

#[test]
fn every_entry_bf16() {
    check_all(bf16::from_f32);
}

/// The LSE, packed sequences, key lengths, strides: no more than without.
#[test]
fn other_inputs() {
    for &n in thread_counts() {
        let threads = Threads::new(n);
        warm_up(&threads);
        let check = |what: &str, run: &(dyn Fn(&mut Workspace) + Sync), bytes: usize| {
            let mut workspace = Workspace::with_capacity(bytes);
            let capacity = workspace.capacity();
            let count = threads.allocations(|| run(&mut workspace));
            assert_eq!(count, 0, "{what}");
            assert_eq!(workspace.capacity(), capacity, "{what}");
        };
        for (way, n) in WAYS {
            let case = Case::new(n, 4);
            let dense = Dense::builder().causal().sinks(vec![0.5; n.q_heads]).build().unwrap();
            let outputs = std::sync::Mutex::new((
                Array4::<f32>::zeros((n.batch, n.q_heads, n.q_len, n.value_dim)),
                Array3::<f32>::zeros((n.batch, n.q_heads, n.q_len)),
            ));
            let lengths = vec![n.kv_len / 2; n.batch];
            let queries = [0, n.q_len / 3, n.q_len / 3, n.q_len];
            let keys = [0, n.kv_len / 2, n.kv_len - 1, n.kv_len];
            let mut inputs = vec![("full", case.x()), ("lengths", case.x().key_lengths(&lengths))];
            if n.batch == 1 {
                inputs.push(("packed", case.x().packed(&queries, &keys)));
            }
            let mut backwards = case.x();
            backwards.q.invert_axis(ndarray::Axis(3));
            backwards.k.invert_axis(ndarray::Axis(3));
            backwards.v.invert_axis(ndarray::Axis(2));
            inputs.push(("backwards", backwards));
            for (what, x) in inputs {
                let bytes = threads.run(|| dense.workspace_bytes(x)).unwrap();
                let run = |workspace: &mut Workspace| {
                    let (out, lse) = &mut *outputs.lock().unwrap();
                    dense.forward_with_lse_into(x, out.view_mut(), lse.view_mut(), workspace).unwrap();
                };
                check(&format!("{way}, {what}"), &run, bytes);
            }
            let ids: Vec<u32> = (0..n.kv_len).map(|i| i as u32 / 50 % 3).collect();
            let mask = Documents::of(&ids[..n.q_len.min(n.kv_len)], &ids).and(Window::new(Some(90), None));
            let dense = Dense::builder().mask(mask).build().unwrap();
            if n.q_len <= n.kv_len {
                let bytes = threads.run(|| dense.workspace_bytes(case.x())).unwrap();
                let run = |workspace: &mut Workspace| {
                    let (out, _) = &mut *outputs.lock().unwrap();
                    dense.forward_into(case.x(), out.view_mut(), workspace).unwrap();
                };
                check(&format!("{way}, documents"), &run, bytes);
            }
        }
    }
}

/// A call from outside a pool hands work over to it. What that may cost is
/// rayon's own: a block of its queue now and then.
#[cfg(feature = "rayon")]
#[test]
fn calls_from_outside() {
    let threads = Threads::new(2);
    warm_up(&threads);
    let case = Case::new(shape([1, 2, 1, 70, 200, 32, 24]), 4);
    let dense = Dense::builder().build().unwrap();
    let mut out = Array4::zeros((1, 2, 70, 24));
    let mut workspace = Workspace::new();
    threads.pool.install(|| dense.forward_into(case.x(), out.view_mut(), &mut workspace)).unwrap();
    COUNTER.set(Some(threads.counter));
    let before = threads.counter.load(Ordering::SeqCst);
    const CALLS: usize = 630;
    for _ in 0..CALLS {
        threads.pool.install(|| dense.forward_into(case.x(), out.view_mut(), &mut workspace)).unwrap();
    }
    let count = threads.counter.load(Ordering::SeqCst) - before;
    COUNTER.set(None);
    // A block of rayon's queue has 63 places.
    assert!(count <= CALLS / 63 + 2, "{count} allocations in {CALLS} calls");
}
