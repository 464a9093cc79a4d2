//! What the numbers say, in sentences: where UltraMem is ahead, by how much, and where it is not and why.

use ultramem_versus::Design;

use super::contest::{Outcome, Row};
use super::{listed, paragraph};
use crate::numbers::grouped;
use crate::rates::Rates;

/// The sentences of a contest over batch sizes.
pub fn verdict(outcome: &Outcome) -> String {
    let mut text = String::from("\nIn short\n");
    text += &next_to_moe(outcome);
    text += &next_to_memories(&outcome.rows);
    text += &next_to_dense(&outcome.rows);
    text += &effort(&outcome.rows);
    text
}

/// Where MoE falls behind.
fn next_to_moe(outcome: &Outcome) -> String {
    let ratio = |row: &Row| row.over_ultramem(Design::Moe);
    let ahead: Vec<&Row> = outcome.rows.iter().filter(|row| ratio(row).is_some_and(|ratio| ratio > 1.0)).collect();
    let best = ahead.iter().max_by(|a, b| f64::total_cmp(&ratio(a).unwrap_or(0.0), &ratio(b).unwrap_or(0.0)));
    let mut text = match best {
        Some(best) => {
            let most = match ahead.len() {
                1 => String::new(),
                _ => format!(", most at batch {}", grouped(best.batch)),
            };
            let why = match bytes_ratio(best) {
                more if more >= FEW => format!("MoE must move {more:.1} times as many bytes"),
                _ => "both must move about as many bytes, so that bytes are not the reason".to_string(),
            };
            let (at, times) = (batches(&ahead), ratio(best).unwrap_or(1.0));
            paragraph(&format!("UltraMem is ahead of MoE at {at}{most}: {times:.2} times as fast, where {why}."))
        }
        None => paragraph("UltraMem is not ahead of MoE at any batch size measured here."),
    };
    let behind = outcome.rows.iter().filter(|row| ratio(row).is_none_or(|ratio| ratio <= 1.0));
    let mut reasons: Vec<(Reason, Vec<&Row>)> = Vec::new();
    for row in behind {
        let reason = Reason::of(row, &outcome.rates);
        match reasons.iter_mut().find(|(other, _)| *other == reason) {
            Some((_, rows)) => rows.push(row),
            None => reasons.push((reason, vec![row])),
        }
    }
    for (reason, rows) in reasons {
        text += &paragraph(&format!("It is not ahead at {}: {}.", batches(&rows), reason.words()));
    }
    text
}

/// Why UltraMem may not be ahead.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reason {
    FewBytes,
    Arithmetic,
    Elsewhere,
}

impl Reason {
    fn of(row: &Row, rates: &Rates) -> Self {
        if bytes_ratio(row) < FEW {
            return Self::FewBytes;
        }
        // A floor that is well above the time of the bytes is one of arithmetic.
        let bound = row.of(Design::UltraMem).is_some_and(|it| it.least.floor_ms > 1.5 * rates.bytes_ms(it.least.bytes));
        if bound { Self::Arithmetic } else { Self::Elsewhere }
    }

    fn words(self) -> &'static str {
        match self {
            Self::FewBytes => {
                "few sequences read few experts, so that MoE moves about as few bytes there, and the dense part, which all share, \
                 takes most of the time"
            }
            Self::Arithmetic => {
                "MoE reads all of its experts there anyway, but many sequences share each of them, and the time goes to arithmetic, \
                 which the budgets make equal"
            }
            Self::Elsewhere => {
                "MoE must move more bytes there, but this device's time goes to other things than bytes: launches and arithmetic"
            }
        }
    }
}

/// A mixture that moves less than so many times UltraMem's bytes moves about as few.
const FEW: f64 = 1.3;

fn bytes_ratio(row: &Row) -> f64 {
    match (row.of(Design::Moe), row.of(Design::UltraMem)) {
        (Some(moe), Some(ultramem)) => moe.least.bytes as f64 / ultramem.least.bytes as f64,
        _ => f64::NAN,
    }
}

/// How the memory layers compare with each other.
fn next_to_memories(rows: &[Row]) -> String {
    let memories = [Design::ProductKey, Design::MemoryPlus];
    let ranges: Vec<String> = memories.into_iter().filter_map(|design| range(rows, design)).collect();
    match ranges.is_empty() {
        true => String::new(),
        false => paragraph(&format!("Of UltraMem's time, its relatives take: {}.", ranges.join("; "))),
    }
}

/// What the sparse parameters cost.
fn next_to_dense(rows: &[Row]) -> String {
    match range(rows, Design::Dense) {
        Some(range) => paragraph(&format!("A model without sparse parameters takes: {range}.")),
        None => String::new(),
    }
}

/// "PKM 0.93 to 1.10 times (no difference beyond noise at batch 16)".
fn range(rows: &[Row], design: Design) -> Option<String> {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.of(design).is_some()).collect();
    let (sure, unsure): (Vec<&Row>, Vec<&Row>) = rows.into_iter().partition(|row| row.over_ultramem(design).is_some());
    let ratios = || sure.iter().filter_map(|row| row.over_ultramem(design));
    let (least, most) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
    let noise = format!("no difference beyond noise at {}", batches(&unsure));
    let times = if format!("{least:.2}") == format!("{most:.2}") {
        format!("{most:.2} times")
    } else {
        format!("{least:.2} to {most:.2} times")
    };
    let name = design.name();
    match (sure.is_empty(), unsure.is_empty()) {
        (true, true) => None,
        (true, false) => Some(format!("{name} {noise}")),
        (false, true) => Some(format!("{name} {times}")),
        (false, false) => Some(format!("{name} {times} ({noise})")),
    }
}

/// Whether MoE is as near to its floor as UltraMem is.
fn effort(rows: &[Row]) -> String {
    let further = |row: &Row| Some(row.of(Design::Moe)?.over_floor() / row.of(Design::UltraMem)?.over_floor());
    let worst = rows.iter().filter_map(|row| Some((row, further(row)?))).max_by(|a, b| f64::total_cmp(&a.1, &b.1));
    let Some((row, factor)) = worst else { return String::new() };
    let batch = grouped(row.batch);
    paragraph(&match factor <= EVEN {
        true => format!(
            "MoE's time over its floor is at most {factor:.2} times UltraMem's (batch {batch}): what is compared is designs, not \
             efforts."
        ),
        false => format!(
            "At batch {batch} MoE is {factor:.2} times further from its floor than UltraMem, so that part of the difference there is \
             effort, not design."
        ),
    })
}

/// How much further from its floor a baseline may be.
const EVEN: f64 = 1.5;

fn batches(rows: &[&Row]) -> String {
    let names: Vec<String> = rows.iter().map(|row| grouped(row.batch)).collect();
    format!("batch {}", listed(&names))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::contest::{Entry, Least};
    use crate::sampling::Times;

    fn entry(design: Design, ms: f64, bytes: u64, floor_ms: f64) -> Entry {
        let ms = Times::of(vec![ms * 0.99, ms, ms * 1.01]);
        Entry { design, ms, least: Least { bytes, flops: 1, floor_ms } }
    }

    fn outcome() -> Outcome {
        let row = |batch, moe, moe_bytes, floor| Row {
            batch,
            entries: vec![
                entry(Design::Dense, 0.9, 10_000_000, floor),
                entry(Design::Moe, moe, moe_bytes, floor * 1.2),
                entry(Design::UltraMem, 1.0, 10_000_000, floor),
            ],
        };
        let rows = vec![row(1, 0.8, 11_000_000, 0.5), row(16, 3.0, 50_000_000, 0.5), row(1024, 1.0, 60_000_000, 5.0)];
        Outcome { rows, rates: Rates { copy_gb_s: 20.0, matrix_flop_ms: 1e6 } }
    }

    fn words(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_verdict_names_where_and_why() {
        let text = words(&verdict(&outcome()));
        for expected in [
            "ahead of MoE at batch 16: 3.00 times as fast, where MoE must move 5.0 times as many bytes",
            "not ahead at batch 1: few sequences read few experts",
            "not ahead at batch 1,024: MoE reads all of its experts there anyway",
            "dense 0.90 times",
            "At batch 16 MoE is 2.50 times further from its floor",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in {text}");
        }
    }

    #[test]
    fn noise_is_no_ratio() {
        let mut outcome = outcome();
        let mut sign = 1.0;
        let mut noisy = || {
            sign = -sign;
            Times::of(vec![1.0 + 0.5 * sign, 1.0 - 0.5 * sign, 1.0])
        };
        outcome.rows.iter_mut().flat_map(|row| &mut row.entries).for_each(|entry| entry.ms = noisy());
        let text = words(&verdict(&outcome));
        assert!(text.contains("not ahead of MoE at any batch size"), "{text}");
        assert!(text.contains("dense no difference beyond noise at batch 1, 16 and 1,024"), "{text}");
    }
}
