//! In which order datagram sockets are connected.
//!
//! A datagram socket takes a connection only from everybody while it is connected to nobody, or from the one that it is
//! connected to. So one is connected after all that connect to it.

use crate::error::{Error, Result};

/// The order for sockets of which each is connected to another (`targets[n]`), or to none of them.
pub(super) fn order(targets: &[Option<usize>]) -> Result<Vec<usize>> {
    // how many must be connected to each before it is
    let mut before = vec![0usize; targets.len()];
    for (from, target) in targets.iter().enumerate() {
        if let Some(to) = *target {
            if to != from && targets[to] != Some(from) {
                before[to] += 1;
            }
        }
    }
    let mut ready: Vec<usize> = (0..targets.len()).rev().filter(|&n| before[n] == 0).collect();
    let mut order = Vec::with_capacity(targets.len());
    while let Some(n) = ready.pop() {
        order.push(n);
        if let Some(to) = targets[n] {
            if to != n && targets[to] != Some(n) {
                before[to] -= 1;
                if before[to] == 0 {
                    ready.push(to);
                }
            }
        }
    }
    if order.len() < targets.len() {
        return Err(Error::lie("files.img", "datagram sockets are connected in a ring, which no kernel lets happen"));
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_target_comes_after_those_that_connect_to_it() {
        // 0 -> 1 -> 2, 3 -> 2, 4 <-> 5, 6 -> itself
        let targets = [Some(1), Some(2), None, Some(2), Some(5), Some(4), Some(6)];
        let order = order(&targets).unwrap();
        let at = |n| order.iter().position(|&m| m == n).unwrap();
        assert_eq!(order.len(), 7);
        assert!(at(0) < at(1) && at(1) < at(2) && at(3) < at(2));
    }

    #[test]
    fn a_ring_is_a_lie() {
        assert!(order(&[Some(1), Some(2), Some(0)]).is_err());
    }
}
