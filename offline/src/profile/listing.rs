//! The machine instructions in a listing of `nvdisasm -g`, each with the line of the source that it comes from.

/// A machine instruction of a listing.
pub(super) struct Machine<'a> {
    /// The line of the source that it comes from; 0 where that is not known.
    pub line: u32,
    pub mnemonic: &'a str,
    /// What follows the mnemonic.
    pub operands: &'a str,
}

/// The machine instructions that `nvdisasm -g` lists, in their order.
pub(super) fn listed(listing: &str) -> Vec<Machine<'_>> {
    let mut line = 0;
    let mut code = Vec::new();
    for text in listing.lines() {
        let text = text.trim();
        if let Some(place) = text.strip_prefix("//## File ") {
            // Of code from a header, the line that it was inlined at comes last.
            let number = place.rsplit("line ").next().and_then(|it| it.split(|c: char| !c.is_ascii_digit()).next());
            line = number.and_then(|it| it.parse().ok()).unwrap_or(line);
        } else if let Some((mnemonic, operands)) = machine(text) {
            code.push(Machine { line, mnemonic, operands });
        }
    }
    code
}

/// `/*01d0*/  @P1 IMAD R7, R5, 0x50, RZ ;`: the mnemonic of a machine instruction, and its operands.
fn machine(text: &str) -> Option<(&str, &str)> {
    let (address, rest) = text.strip_prefix("/*")?.split_once("*/")?;
    u32::from_str_radix(address, 16).ok()?;
    let mut rest = rest.trim_start();
    while rest.starts_with(['@', '{']) {
        rest = rest.split_once(char::is_whitespace)?.1.trim_start();
    }
    let (mnemonic, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mnemonic = mnemonic.trim_end_matches(';');
    (!mnemonic.is_empty()).then_some((mnemonic, operands))
}
