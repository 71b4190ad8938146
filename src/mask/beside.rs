//! Masks of keys beside those that another mask knows.

use std::ops::Range;

use super::{Coverage, Mask, range_bits};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};

/// The first `known` keys as another mask has them, and all that follow, of
/// which there are `more`.
#[derive(Clone, Debug)]
pub(crate) struct Beside<M> {
    pub(crate) mask: M,
    pub(crate) known: usize,
    pub(crate) more: usize,
}

impl<M: Mask> Beside<M> {
    #[inline(always)]
    fn site(&self, site: &Site) -> Site {
        Site { kv_len: self.known, ..*site }
    }
}

impl<M: Mask> Mask for Beside<M> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        key >= self.known || self.mask.visible(&self.site(site), query, key)
    }

    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let hull = self.mask.hull(&self.site(site), queries);
        match (hull.is_empty(), self.more) {
            (_, 0) => hull,
            (true, _) => self.known..site.kv_len,
            (false, _) => hull.start..site.kv_len,
        }
    }

    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if keys.start >= self.known {
            return Coverage::Full;
        }
        let known = self.mask.coverage(&self.site(site), queries, keys.start..keys.end.min(self.known));
        match known {
            Coverage::Empty if keys.end > self.known => Coverage::Partial,
            known => known,
        }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let more = range_bits(self.known as isize..site.kv_len as isize, first);
        if first >= self.known {
            return more;
        }
        let known = range_bits(0..self.known as isize, first);
        self.mask.bits(&self.site(site), query, first) & known | more
    }

    fn is_shared(&self) -> bool {
        self.mask.is_shared()
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        let Some(known) = dims.kv_len.checked_sub(self.more) else {
            return Err(Error::value("k", format!("at least {} keys", self.more), dims.kv_len));
        };
        self.mask.check(&Dims { kv_len: known, ..*dims })
    }

    fn check_sequence(&self, site: &Site) -> Result<()> {
        self.mask.check_sequence(&self.site(site))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Window;

    #[test]
    fn what_follows_is_seen_by_all() {
        let window = Window::new(Some(3), Some(2));
        for (q_len, known, more) in [(5, 9, 4), (70, 60, 90), (10, 64, 1), (10, 20, 0)] {
            let mask = Beside { mask: window, known, more };
            let site = Site { batch: 0, head: 0, q_len, kv_len: known + more };
            for i in 0..q_len {
                let hull = mask.hull(&site, i..i + 1);
                for j in 0..known + more {
                    let sees = j >= known || window.visible(&Site { kv_len: known, ..site }, i, j);
                    assert_eq!(mask.visible(&site, i, j), sees);
                    assert_eq!(mask.bits(&site, i, j / 7 * 7) >> (j % 7) & 1 == 1, sees, "{i} {j}");
                    assert!(!sees || hull.contains(&j));
                    let keys = j..(j + 9).min(known + more);
                    let seen = keys.clone().filter(|&j| mask.visible(&site, i, j)).count();
                    match mask.coverage(&site, i..i + 1, keys.clone()) {
                        Coverage::Empty => assert_eq!(seen, 0),
                        Coverage::Full => assert_eq!(seen, keys.len()),
                        Coverage::Partial => {}
                    }
                }
            }
        }
    }
}
