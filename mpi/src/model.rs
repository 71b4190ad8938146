//! A model of what a layer takes: rates that were measured, and how many operations and
//! bytes each form has. It says on which machines the wire is what one waits for.
//!
//! ```text
//! time    = compute + wire          nothing travels while a rank works
//! compute = flops of the busiest machine / (rate of a core * cores)
//! wire    = messages * latency + bytes * (1 / bandwidth + copying), of the busiest machine
//! ```
//!
//! Machines send and receive at once, at the bandwidth of their link, whoever else does. Rates
//! of a core are those of [`Rates::MEASURED`], [fitted](Rates#fit) on one machine; that
//! cores add up is part of the model.

/// What machines and the wire between them do.
///
/// # Fit
///
/// `softmax` and `recurrence` are one rank on one core of `examples/long_sequence`: 32,768
/// tokens, 8 heads of 64, `f32`. `states` is an upper limit: a whole pass. `reads` is `examples/lamina` on one rank. `latency` and `copy`
/// are messages of 1 KiB and of 64 MiB between two ranks of one machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Flops a second of a core in softmax attention.
    pub softmax: f64,
    /// Flops a second of a core in recurrences.
    pub recurrence: f64,
    /// What states without outputs take of a pass with them.
    pub states: f64,
    /// Bytes of a cache that a core reads a second.
    pub reads: f64,
    /// Cores of a machine.
    pub cores: f64,
    /// Seconds of a message besides its bytes.
    pub latency: f64,
    /// Seconds that packing, copying and unpacking a byte takes.
    pub copy: f64,
    /// Bytes a second on a link.
    pub bandwidth: f64,
}

impl Rates {
    /// One core, and the memory of one machine for a wire.
    pub const MEASURED: Self = Self {
        softmax: 8.1e10,
        recurrence: 4.4e10,
        states: 1.0,
        reads: 1.3e9,
        cores: 1.0,
        latency: 2.2e-6,
        copy: 3.6e-9,
        bandwidth: f64::INFINITY,
    };

    /// Machines of so many cores with links of so many Gbit a second.
    pub fn machines(self, cores: f64, gbits: f64) -> Self {
        Self { cores, bandwidth: gbits * 1e9 / 8.0, ..self }
    }
}

/// Sizes of a causal layer, one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// Tokens of the sequence, those of all ranks.
    pub tokens: usize,
    /// Heads of the queries.
    pub q_heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Bytes of an element.
    pub element: usize,
}

/// How a layer is spread over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`Ring::forward`](crate::ring::Ring::forward), cut in a zigzag.
    Ring,
    /// [`gathered::forward`](crate::gathered::forward), cut in a zigzag: softmax layers of
    /// LASP-2H.
    Gathered,
    /// [`heads::forward`](crate::heads::forward).
    Heads,
    /// [`lasp::forward`](crate::lasp::forward) of a recurrence with a decay for each row.
    Lasp,
    /// [`spread::attend`](crate::spread::attend): one token that is decoded over the cache.
    Spread,
}

/// Seconds of the machine that takes longest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// At work.
    pub compute: f64,
    /// Sending and receiving.
    pub wire: f64,
}

impl Estimate {
    /// Both.
    pub fn seconds(&self) -> f64 {
        self.compute + self.wire
    }

    /// Whether more than half of the time is the wire's.
    pub fn is_wire_bound(&self) -> bool {
        self.wire > self.compute
    }
}

/// What a layer takes on so many ranks.
///
/// ```
/// use attention_kernels_mpi::model::{Form, Layer, Rates, estimate};
///
/// let layer =
///     Layer { tokens: 1 << 17, q_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128, element: 2 };
/// let rates = Rates::MEASURED.machines(32.0, 10.0);
/// let (few, many) = (estimate(Form::Lasp, layer, 4, rates), estimate(Form::Lasp, layer, 64, rates));
/// assert!(few.compute > 15.0 * many.compute && many.wire > few.wire);
/// ```
pub fn estimate(form: Form, layer: Layer, ranks: usize, rates: Rates) -> Estimate {
    let Layer { tokens, q_heads, kv_heads, head_dim, value_dim, element } = layer;
    let [n, r, q, kv, d, dv, e] =
        [tokens, ranks, q_heads, kv_heads, head_dim, value_dim, element].map(|x| x as f64);
    let others = r - 1.0;
    let softmax = n * n * q * (d + dv) / (rates.softmax * rates.cores);
    // As `linear::Lightning` counts them.
    let recurrence = n * q * (32.0 * (d + dv) + 4.0 * d * dv) / (rates.recurrence * rates.cores);
    // Work, messages and bytes of the busiest machine; agreements are two records.
    let (compute, messages, bytes) = match form {
        Form::Ring | Form::Gathered => (softmax / r, others, others * n / r * kv * (d + dv) * e),
        Form::Heads => {
            let mine = (q / r).ceil();
            let read = (kv / r).max(1.0);
            let out = others * n / r * (mine * d + read * (d + dv)) * e;
            (softmax * mine / q, 2.0 * others, out + others * n / r * mine * dv * 4.0)
        }
        Form::Lasp => {
            let again = if others > 0.0 { rates.states } else { 0.0 };
            (recurrence / r * (1.0 + again), others, others * 4.0 * q * d * (dv + 1.0))
        }
        Form::Spread => {
            let cache = n / r * kv * (d + dv) * e / (rates.reads * rates.cores);
            (cache, 2.0 * others, others * q * (d * e + (dv + 1.0) * 4.0))
        }
    };
    let wire = (messages + 2.0 * others) * rates.latency + bytes * (1.0 / rates.bandwidth + rates.copy);
    Estimate { compute, wire }
}

/// The layer and the machines of the README's table, which a test compares with this.
#[doc(hidden)]
pub fn table() -> String {
    let layer =
        Layer { tokens: 1 << 17, q_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128, element: 2 };
    let machines = [4, 8, 16, 32, 64];
    let mut lines = vec!["| | Gbit/s | 4 | 8 | 16 | 32 | 64 |".to_owned()];
    lines.push(format!("|---|---{}|", "|---".repeat(machines.len())));
    for (name, form) in [
        ("ring", Form::Ring),
        ("gathered, LASP-2H", Form::Gathered),
        ("heads", Form::Heads),
        ("LASP-2", Form::Lasp),
        ("DistAttention, a token", Form::Spread),
    ] {
        for gbits in [10.0, 100.0] {
            let cells = machines.map(|ranks| {
                let took = estimate(form, layer, ranks, Rates::MEASURED.machines(32.0, gbits));
                let share = format!("{:.0} %", 100.0 * took.wire / took.seconds());
                let share = if took.is_wire_bound() { format!("**{share}**") } else { share };
                format!("{}, {share}", time(took.seconds()))
            });
            lines.push(format!("| {name} | {gbits} | {} |", cells.join(" | ")));
        }
    }
    lines.join("\n") + "\n"
}

/// Two digits.
fn time(seconds: f64) -> String {
    let (x, unit) = match seconds {
        x if x < 1e-3 => (x * 1e6, "us"),
        x if x < 1.0 => (x * 1e3, "ms"),
        x => (x, "s"),
    };
    if x < 9.95 { format!("{x:.1} {unit}") } else { format!("{x:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: Layer =
        Layer { tokens: 32_768, q_heads: 8, kv_heads: 8, head_dim: 64, value_dim: 64, element: 4 };

    #[test]
    fn the_readme_has_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let (start, end) = ("<!-- model -->\n", "<!-- end of model -->");
        let (before, rest) = readme.split_once(start).unwrap();
        let (got, after) = rest.split_once(end).unwrap();
        if std::env::var_os("UPDATE_README").is_some() {
            std::fs::write(path, format!("{before}{start}{}{end}{after}", table())).unwrap();
        } else {
            assert_eq!(got, table(), "UPDATE_README=1 cargo test -p attention-kernels-mpi writes it");
        }
    }

    #[test]
    fn one_rank_waits_for_no_wire() {
        for form in [Form::Ring, Form::Gathered, Form::Heads, Form::Lasp, Form::Spread] {
            assert_eq!(estimate(form, LAYER, 1, Rates::MEASURED).wire, 0.0);
            // Where the wire costs nothing, more ranks take less.
            let free = Rates { latency: 0.0, copy: 0.0, ..Rates::MEASURED };
            let took = [1, 2, 4, 8].map(|ranks| estimate(form, LAYER, ranks, free).seconds());
            assert!(took[1] <= took[0] && took[2] < took[1] && took[3] < took[2], "{form:?}: {took:?}");
        }
    }

    #[test]
    fn what_travels_grows_as_the_forms_say() {
        let wire = Rates { latency: 0.0, ..Rates::MEASURED }.machines(1.0, 10.0);
        let long = Layer { tokens: 2 * LAYER.tokens, ..LAYER };
        for (form, grows) in [(Form::Ring, 2.0), (Form::Heads, 2.0), (Form::Lasp, 1.0), (Form::Spread, 1.0)] {
            let took = [LAYER, long].map(|layer| estimate(form, layer, 4, wire).wire);
            assert!((took[1] / took[0] - grows).abs() < 1e-9, "{form:?}: {took:?}");
        }
        // With many ranks a ring sends all of its keys, heads a share of theirs.
        let of = |form, ranks| estimate(form, LAYER, ranks, wire).wire;
        assert!(of(Form::Ring, 8) > 1.1 * of(Form::Ring, 4));
        assert!(of(Form::Heads, 8) < 0.7 * of(Form::Heads, 4));
    }

    #[test]
    fn heads_are_worked_on_by_as_many_ranks_as_there_are() {
        let free = Rates { latency: 0.0, copy: 0.0, ..Rates::MEASURED };
        let took = |ranks| estimate(Form::Heads, LAYER, ranks, free).compute;
        assert_eq!(took(8), took(64));
        assert_eq!(took(3), 3.0 * took(8));
    }
}
