//! How many loads a warp has under way, by what `ptxas` made of them: from a load to the first instruction that reads what it loads, the
//! loads that are issued between. The source doesn't say: registers for few of them leave few under way, in whatever order it has them.

use std::collections::HashMap;

use super::listing::{Machine, listed};

/// Of each line of the source, for loads from shared memory and for all others: the most that are under way.
pub type Flight = HashMap<(u32, bool), usize>;

/// Loads under way in a listing of `nvdisasm -g`.
pub fn flight(listing: &str) -> Flight {
    let code = listed(listing);
    let mut flight = Flight::new();
    for (at, machine) in code.iter().enumerate() {
        let Some(shared) = loads(machine) else { continue };
        let targets = targets(machine);
        let behind = code[at + 1..].iter();
        let until = behind.take_while(|it| !ends(it) && !reads(it, &targets));
        let count = 1 + until.filter(|it| loads(it) == Some(shared)).count();
        let most = flight.entry((machine.line, shared)).or_default();
        *most = count.max(*most);
    }
    flight
}

/// Whether it loads: from shared memory or from elsewhere.
fn loads(machine: &Machine<'_>) -> Option<bool> {
    match machine.mnemonic.split('.').next()? {
        "LDS" | "LDSM" => Some(true),
        "LDG" | "LD" => Some(false),
        _ => None,
    }
}

/// Behind these nothing is known: a loop begins anew, or the kernel ends.
fn ends(machine: &Machine<'_>) -> bool {
    ["EXIT", "BRA", "RET", "BRX"].iter().any(|it| machine.mnemonic.starts_with(it))
}

/// Registers that a load writes.
fn targets(machine: &Machine<'_>) -> std::ops::Range<u32> {
    let first = registers(machine.operands.split(',').next().unwrap_or("")).next();
    let has = |part: &str| machine.mnemonic.split('.').any(|it| it == part);
    let count = match () {
        () if has("128") || has("LDSM") && has("4") => 4,
        () if has("64") || has("LDSM") && has("2") => 2,
        () => 1,
    };
    first.map_or(0..0, |first| first..first + count)
}

/// Whether an instruction reads any of some registers: stores read all that they name, others all but the first.
fn reads(machine: &Machine<'_>, targets: &std::ops::Range<u32>) -> bool {
    let stores = ["ST", "RED", "ATOM"].iter().any(|it| machine.mnemonic.starts_with(it));
    let sources = if stores { machine.operands } else { machine.operands.split_once(',').map_or("", |it| it.1) };
    registers(sources).any(|register| targets.contains(&register))
}

/// The numbers of the registers that a text names: `R12`, not `UR4`.
fn registers(text: &str) -> impl Iterator<Item = u32> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|word| word.strip_prefix('R')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_under_way_until_they_are_read() {
        let listing = "
	//## File \"/x/default_program\", line 7
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   LDS R20, [R1] ;
        /*0030*/                   IADD3 R30, R6, R31, RZ ;
        /*0040*/                   LDG.E R12, desc[UR4][R2.64+0x20] ;
	//## File \"/x/default_program\", line 9
        /*0050*/                   LDG.E R4, desc[UR8][R2.64+0x24] ;
        /*0060*/                   STG.E desc[UR4][R2.64], R12 ;
        /*0070*/                   FADD R12, R8, R4 ;
        /*0080*/                   FADD R12, R20, R4 ;
";
        let flight = flight(listing);
        // The second load is read at 70, with three others behind it; the one of line 9 alone.
        assert_eq!(flight[&(7, false)], 3);
        assert_eq!((flight[&(9, false)], flight[&(7, true)]), (1, 1));
    }

    #[test]
    fn one_load_after_the_other_is_one() {
        let pair =
            |at: u32| format!("/*{at:04x}*/ LDG.E R4, desc[UR4][R2.64] ;\n/*{:04x}*/ FADD R0, R0, R4 ;\n", at + 16);
        let listing = format!("//## File \"/x/default_program\", line 3\n{}{}", pair(0), pair(32));
        assert_eq!(flight(&listing)[&(3, false)], 1);
    }
}
