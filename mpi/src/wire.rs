//! A group of ranks: agreement before anything large travels, and waits that end.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use mpi::request::scope;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};

use crate::error::{Error, Result};

/// Bytes of the record that ranks agree on: small enough to be sent at once, whether the
/// other one is there or not.
const RECORD: usize = 1024;
/// Numbers of a record come before its message.
const NUMBERS: usize = 64;
/// Bytes of a message: MPI counts in 32 bits.
const PIECE: usize = 1 << 28;
const AGREE: i32 = 1;
const DATA: i32 = 2;

/// What a rank has sent and waited for since it was asked last.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Bytes sent to other ranks, without the records of agreements.
    pub bytes: u64,
    /// Messages they were.
    pub messages: u64,
    /// Agreements, each a record of 1 KiB to every other rank.
    pub agreements: u64,
    /// Time spent waiting for other ranks.
    pub waited: Duration,
}

/// The ranks that work on a sequence together.
///
/// Its calls are collective. It has a communicator of its own, so that other messages of
/// the program are not mistaken for its.
pub struct Group {
    comm: SimpleCommunicator,
    patience: Duration,
    round: Cell<u64>,
    lost: Cell<Option<usize>>,
    traffic: Cell<Traffic>,
    waits: RefCell<Vec<Duration>>,
    jitter: Cell<u64>,
}

impl Group {
    /// All ranks of a communicator: a collective call of MPI. Waits are bounded by a minute.
    pub fn new(comm: &impl Communicator) -> Self {
        let comm = comm.duplicate();
        let waits = RefCell::new(vec![Duration::ZERO; comm.size().unsigned_abs() as usize]);
        Self {
            comm,
            patience: Duration::from_secs(60),
            round: Cell::new(0),
            lost: Cell::new(None),
            traffic: Cell::default(),
            waits,
            jitter: Cell::new(0),
        }
    }

    /// Waits for a rank no longer than this: more than the longest computation between two
    /// calls. A rank that stops within a call, when its message is half sent, ends the
    /// program (`MPI_Abort`, after naming the rank): MPI cannot take a message back.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Sleeps up to some milliseconds before each message, as the seed says: for tests that
    /// results do not depend on what arrives first.
    #[doc(hidden)]
    pub fn with_jitter(self, seed: u64) -> Self {
        Self { jitter: Cell::new(seed), ..self }
    }

    /// How long a rank is waited for.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The number of this rank.
    pub fn rank(&self) -> usize {
        self.comm.rank().unsigned_abs() as usize
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.comm.size().unsigned_abs() as usize
    }

    /// What was sent and waited for since the last time this was asked.
    pub fn take_traffic(&self) -> Traffic {
        self.traffic.take()
    }

    /// How long each rank was waited for since the last time this was asked.
    pub fn take_waits(&self) -> Vec<Duration> {
        self.waits.replace(vec![Duration::ZERO; self.size()])
    }

    fn count(&self, add: impl FnOnce(&mut Traffic)) {
        let mut traffic = self.traffic.get();
        add(&mut traffic);
        self.traffic.set(traffic);
    }

    fn note_wait(&self, rank: usize, since: Instant) {
        let waited = since.elapsed();
        self.waits.borrow_mut()[rank] += waited;
        self.count(|traffic| traffic.waited += waited);
    }

    /// Tells all ranks these numbers, or what is wrong here, and hears theirs: one list a
    /// rank, on every rank the same. At most 63 numbers.
    pub(crate) fn agree(&self, call: &'static str, mine: Result<Vec<u64>, String>) -> Result<Vec<Vec<u64>>> {
        if let Some(rank) = self.lost.get() {
            return Err(Error::Lost { rank });
        }
        let round = self.round.replace(self.round.get() + 1);
        let record = encode(call, round, &mine);
        let (me, size) = (self.rank(), self.size());
        self.count(|traffic| traffic.agreements += 1);
        for rank in (0..size).filter(|&rank| rank != me) {
            self.comm.process_at_rank(rank as i32).send_with_tag(&record[..], AGREE);
        }
        let deadline = Instant::now() + self.patience;
        let mut all = Vec::with_capacity(size);
        for rank in 0..size {
            let mut theirs = vec![0u8; RECORD];
            if rank == me {
                theirs.copy_from_slice(&record);
            } else {
                self.hear(call, rank, deadline, &mut theirs)?;
            }
            all.push(decode(&theirs));
        }
        // What another rank is in the middle of comes first: numbers mean nothing then.
        let (call_of_first, round_of_first) = (all[0].0, all[0].1);
        if let Some(rank) = all.iter().position(|other| (other.0, other.1) != (call_of_first, round_of_first))
        {
            self.lost.set(Some(rank));
            let message = "call: expected the one that rank 0 makes, got another".to_owned();
            return Err(Error::Argument { rank, message });
        }
        let mut numbers = Vec::with_capacity(size);
        for (rank, (_, _, theirs)) in all.into_iter().enumerate() {
            numbers.push(theirs.map_err(|message| Error::Argument { rank, message })?);
        }
        Ok(numbers)
    }

    fn hear(&self, call: &'static str, rank: usize, deadline: Instant, to: &mut [u8]) -> Result<()> {
        let (since, process) = (Instant::now(), self.comm.process_at_rank(rank as i32));
        loop {
            if let Some((message, _)) = process.immediate_matched_probe_with_tag(AGREE) {
                message.matched_receive_into(to);
                self.note_wait(rank, since);
                return Ok(());
            }
            if Instant::now() > deadline {
                self.note_wait(rank, since);
                self.lost.set(Some(rank));
                return Err(Error::Silent { rank, call, patience: self.patience });
            }
            std::thread::yield_now();
        }
    }

    /// Sends to one rank while it receives from another. Lengths were agreed on.
    pub(crate) fn pass(&self, to: usize, out: &[u8], from: usize, into: &mut [u8]) {
        if to == self.rank() && from == self.rank() {
            into.copy_from_slice(out);
            return;
        }
        if self.jitter.get() != 0 {
            let next = self.jitter.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(to as u64 + 1);
            self.jitter.set(next);
            std::thread::sleep(Duration::from_micros(next >> 52));
        }
        let since = Instant::now();
        self.count(|traffic| {
            traffic.bytes += out.len() as u64;
            traffic.messages += out.len().div_ceil(PIECE) as u64;
        });
        let (there, here) = (self.comm.process_at_rank(to as i32), self.comm.process_at_rank(from as i32));
        scope(|scope| {
            let receives: Vec<_> = into
                .chunks_mut(PIECE)
                .map(|piece| (from, here.immediate_receive_into_with_tag(scope, piece, DATA)))
                .collect();
            let sends =
                out.chunks(PIECE).map(|piece| (to, there.immediate_send_with_tag(scope, piece, DATA)));
            let mut open: Vec<_> = receives.into_iter().chain(sends).collect();
            while !open.is_empty() {
                open = open
                    .into_iter()
                    .filter_map(|(rank, request)| request.test().err().map(|request| (rank, request)))
                    .collect();
                if let Some((rank, _)) = open.first().filter(|_| since.elapsed() > self.patience) {
                    eprintln!("rank {rank}: stopped within a message for {:?}", self.patience);
                    self.comm.abort(1);
                }
                std::thread::yield_now();
            }
        });
        self.note_wait(from, since);
    }

    /// What every rank has, on every rank: `lengths` says how many bytes each one has.
    pub(crate) fn gather(&self, mine: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
        self.exchange(&vec![mine; self.size()], lengths)
    }

    /// `out[r]` goes to rank `r`; what rank `r` has for this one comes back, of length
    /// `lengths[r]`.
    pub(crate) fn exchange(&self, out: &[&[u8]], lengths: &[usize]) -> Vec<Vec<u8>> {
        let (me, size) = (self.rank(), self.size());
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&bytes| vec![0; bytes]).collect();
        for step in 0..size {
            let (to, from) = ((me + step) % size, (me + size - step) % size);
            self.pass(to, out[to], from, &mut all[from]);
        }
        all
    }

    /// Ends a call: every rank says whether it got through.
    pub(crate) fn close<T>(&self, call: &'static str, mine: Result<T, String>) -> Result<T> {
        let (value, said) = match mine {
            Ok(value) => (Some(value), Ok(Vec::new())),
            Err(message) => (None, Err(message)),
        };
        self.agree(call, said)?;
        let message = "expected a result".to_owned();
        value.ok_or(Error::Argument { rank: self.rank(), message })
    }
}

fn encode(call: &str, round: u64, mine: &Result<Vec<u64>, String>) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD);
    let name = call.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let count = mine.as_ref().map_or(u64::MAX, |numbers| numbers.len() as u64);
    for number in [name, round, count] {
        record.extend_from_slice(&number.to_ne_bytes());
    }
    match mine {
        Ok(numbers) => numbers.iter().take(NUMBERS).for_each(|x| record.extend_from_slice(&x.to_ne_bytes())),
        Err(message) => record.extend(message.bytes().take(RECORD - 24)),
    }
    record.resize(RECORD, 0);
    record
}

fn decode(record: &[u8]) -> (u64, u64, Result<Vec<u64>, String>) {
    let number = |i: usize| u64::from_ne_bytes(std::array::from_fn(|b| record[8 * i + b]));
    let what = match number(2) {
        u64::MAX => {
            let text = &record[24..];
            let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
            Err(String::from_utf8_lossy(&text[..end]).into_owned())
        }
        count => Ok((0..(count as usize).min(NUMBERS)).map(|i| number(3 + i)).collect()),
    };
    (number(0), number(1), what)
}
