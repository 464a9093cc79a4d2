//! The picture of a series of measurements: panels side by side with logarithmic axes, a line with markers for each contestant, its
//! floor dashed in the same colour, one legend above them all.
//!
//! Colours are Okabe and Ito's, which colour-blind people can tell apart; each contestant has a marker of its own besides.

use plotters::coord::Shift;
use plotters::coord::combinators::{LogCoord, WithKeyPoints};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::failure::Result;
use crate::sampling::{Ratio, Times};

/// How a contestant looks.
pub mod look {
    use plotters::style::RGBColor;
    use ultramem_versus::Design;

    use super::{Look, Marker};

    pub const BLACK: RGBColor = RGBColor(0, 0, 0);
    pub const ORANGE: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
    pub const SKY: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
    pub const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
    pub const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
    pub const VERMILION: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
    pub const PURPLE: RGBColor = RGBColor(0xcc, 0x79, 0xa7);

    /// A whole layer.
    pub const FORWARD: Look = Look(BLACK, Marker::Circle);
    /// Its stages.
    pub const STAGES: [Look; 5] = [
        Look(ORANGE, Marker::Square),
        Look(BLUE, Marker::Up),
        Look(PURPLE, Marker::Down),
        Look(GREEN, Marker::Diamond),
        Look(VERMILION, Marker::Circle),
    ];
    /// A stage beside whole models.
    pub const SCORE: Look = Look(SKY, Marker::Diamond);

    /// A design's model.
    pub fn of(design: Design) -> Look {
        match design {
            Design::Dense => Look(BLACK, Marker::Square),
            Design::Moe => Look(VERMILION, Marker::Up),
            Design::ProductKey => Look(ORANGE, Marker::Down),
            Design::MemoryPlus => Look(GREEN, Marker::Diamond),
            Design::Peer => Look(PURPLE, Marker::Left),
            Design::UltraMemV2 => Look(SKY, Marker::Right),
            Design::UltraMem => Look(BLUE, Marker::Circle),
        }
    }
}

/// A colour and a marker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look(RGBColor, Marker);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Marker {
    Circle,
    Square,
    Diamond,
    Up,
    Down,
    Left,
    Right,
}

/// What is drawn.
#[derive(Debug)]
pub struct Chart {
    /// What is shown.
    pub title: String,
    /// Where it was measured.
    pub device: String,
    /// Of the horizontal axis of every panel.
    pub x_title: String,
    /// Places on it and their names.
    pub ticks: Vec<(f64, String)>,
    /// From left to right.
    pub panels: Vec<Panel>,
}

/// One pair of axes.
#[derive(Debug)]
pub struct Panel {
    /// With its unit.
    pub y_title: String,
    /// Later ones lie above earlier ones.
    pub lines: Vec<Line>,
}

/// One line.
#[derive(Debug)]
pub struct Line {
    /// The contestant.
    pub name: String,
    /// From left to right.
    pub points: Vec<Point>,
    look: Look,
    role: Role,
}

/// What a line means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Role {
    /// A time or a number of bytes: markers on a line, with the spread where there is one.
    Measured,
    /// A part of what another line shows: the same, thinner.
    Part,
    /// The least that is possible: dashed.
    Floor,
}

/// A place on a line and its spread.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    x: f64,
    y: f64,
    lower: f64,
    upper: f64,
}

impl Line {
    /// A line without points yet.
    pub fn new(name: impl Into<String>, look: Look, role: Role) -> Self {
        Self { name: name.into(), points: Vec::new(), look, role }
    }
}

impl Point {
    /// A number that was counted.
    pub fn at(x: f64, y: f64) -> Self {
        Self { x, y, lower: y, upper: y }
    }

    /// The median of times and the middle half of them.
    pub fn of(x: f64, times: &Times) -> Self {
        Self { x, y: times.median, lower: times.lower, upper: times.upper }
    }

    /// A ratio and its interval.
    pub fn of_ratio(x: f64, ratio: &Ratio) -> Self {
        Self { x, y: ratio.median, lower: ratio.interval.0, upper: ratio.interval.1 }
    }
}

/// Pixels. A README is about as wide.
pub const WIDTH: u32 = 860;
const PANELS: u32 = 356;
pub const TITLE: i32 = 10;
pub const DEVICE: i32 = 36;
pub const LEGEND: i32 = 68;
pub const LEGEND_ROW: i32 = 22;
pub const MARGIN: i32 = 16;
const X_LABELS: i32 = 48;
const Y_LABELS: i32 = 62;

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Axis = WithKeyPoints<LogCoord<f64>>;
type Axes<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

impl Chart {
    /// The picture as SVG.
    pub fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        {
            let legend = self.legend();
            let head = legend.last().map_or(LEGEND, |entry| entry.at.1) + LEGEND_ROW;
            let size = (WIDTH, head as u32 + PANELS);
            let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            area.fill(&WHITE)?;
            area.draw(&Text::new(self.title.clone(), (MARGIN, TITLE), font(18)))?;
            area.draw(&Text::new(self.device.clone(), (MARGIN, DEVICE), font(13).color(&GREY)))?;
            legend.iter().try_for_each(|entry| entry.draw(&area))?;
            let (_, body) = area.split_vertically(head);
            for (panel, area) in self.panels.iter().zip(body.split_evenly((1, self.panels.len().max(1)))) {
                self.panel(panel, &area)?;
            }
            area.present()?;
        }
        Ok(svg)
    }

    /// Each contestant once, and what a dashed line is.
    fn legend(&self) -> Vec<Entry<'_>> {
        let lines = || self.panels.iter().flat_map(|panel| &panel.lines);
        let mut entries: Vec<Entry<'_>> = Vec::new();
        for line in lines().filter(|line| line.role != Role::Floor) {
            if entries.iter().all(|entry| entry.name != line.name) {
                entries.push(Entry { name: &line.name, line: Some(line), at: (0, 0) });
            }
        }
        if lines().any(|line| line.role == Role::Floor) {
            entries.push(Entry { name: FLOOR, line: None, at: (0, 0) });
        }
        let mut at = (MARGIN, LEGEND);
        for entry in &mut entries {
            if at.0 + entry.width() > WIDTH as i32 {
                at = (MARGIN, at.1 + LEGEND_ROW);
            }
            entry.at = at;
            at.0 += entry.width();
        }
        entries
    }

    fn panel(&self, panel: &Panel, area: &Area<'_>) -> Result<()> {
        let points = || panel.lines.iter().flat_map(|line| &line.points);
        let (from_x, to_x) = widened(points().map(|point| point.x), 1.25);
        let (from_y, to_y) = widened(points().flat_map(|point| [point.lower, point.upper]), 1.25);
        let (width, height) = area.dim_in_pixel();
        let width = width as i32 - Y_LABELS - 2 * MARGIN;
        let ticks = apart(&self.ticks, from_x, to_x, f64::from(width));
        let y_ticks = decades(from_y, to_y, f64::from(height));
        let mut axes: Axes<'_, '_> = ChartBuilder::on(area)
            .margin(MARGIN)
            .margin_left(4)
            .x_label_area_size(X_LABELS)
            .y_label_area_size(Y_LABELS)
            .build_cartesian_2d(
                (from_x..to_x).log_scale().with_key_points(ticks.iter().map(|(x, _)| *x).collect()),
                (from_y..to_y).log_scale().with_key_points(y_ticks),
            )?;
        let name = |x: &f64| ticks.iter().find(|(at, _)| at == x).map(|(_, name)| name.clone()).unwrap_or_default();
        axes.configure_mesh()
            .bold_line_style(RULE.stroke_width(1))
            .light_line_style(TRANSPARENT)
            .axis_style(GREY.stroke_width(1))
            .label_style(font(13))
            .axis_desc_style(font(14))
            .x_desc(self.x_title.clone())
            .y_desc(panel.y_title.clone())
            .x_label_formatter(&name)
            .y_label_formatter(&|y| number(*y))
            .draw()?;
        for line in &panel.lines {
            line.draw(&axes)?;
        }
        Ok(())
    }
}

impl Line {
    fn stroke(&self) -> ShapeStyle {
        self.look.0.stroke_width(if self.role == Role::Part { 1 } else { 2 })
    }

    fn draw(&self, axes: &Axes<'_, '_>) -> Result<()> {
        let area = axes.plotting_area().strip_coord_spec();
        let (left, top) = area.get_base_pixel();
        let pixel = |x: f64, y: f64| {
            let (x, y) = axes.backend_coord(&(x, y));
            (x - left, y - top)
        };
        let mut path: Vec<(i32, i32)> = self.points.iter().map(|point| pixel(point.x, point.y)).collect();
        if self.role == Role::Floor {
            // A line of one place would not be seen.
            if let [(x, y)] = path[..] {
                path = vec![(x - SWATCH, y), (x + SWATCH, y)];
            }
            area.draw(&DashedPathElement::new(path, DASH, GAP, self.stroke()))?;
            return Ok(());
        }
        area.draw(&PathElement::new(path.clone(), self.stroke()))?;
        for (point, &at) in self.points.iter().zip(&path) {
            let spread = [pixel(point.x, point.lower), pixel(point.x, point.upper)];
            if spread[0] != spread[1] {
                area.draw(&PathElement::new(spread, self.look.0.stroke_width(1)))?;
            }
            self.marker(&area, at)?;
        }
        Ok(())
    }

    fn marker(&self, area: &Area<'_>, (x, y): (i32, i32)) -> Result<()> {
        let size = if self.role == Role::Part { 3 } else { 5 };
        let corners: &[(i32, i32)] = match self.look.1 {
            Marker::Circle => {
                area.draw(&Circle::new((x, y), size, self.look.0.filled()))?;
                return Ok(());
            }
            Marker::Square => &[(-1, -1), (1, -1), (1, 1), (-1, 1)],
            Marker::Diamond => &[(0, -1), (1, 0), (0, 1), (-1, 0)],
            Marker::Up => &[(0, -1), (1, 1), (-1, 1)],
            Marker::Down => &[(0, 1), (1, -1), (-1, -1)],
            Marker::Left => &[(-1, 0), (1, 1), (1, -1)],
            Marker::Right => &[(1, 0), (-1, 1), (-1, -1)],
        };
        let corners: Vec<(i32, i32)> = corners.iter().map(|(dx, dy)| (x + dx * size, y + dy * size)).collect();
        Ok(area.draw(&Polygon::new(corners, self.look.0.filled()))?)
    }
}

pub const GREY: RGBColor = RGBColor(0x55, 0x55, 0x55);
pub const RULE: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);
/// Pixels of a line in the legend, and of a dash and the gap after it.
pub const SWATCH: i32 = 26;
pub const DASH: u32 = 6;
pub const GAP: u32 = 4;

const FLOOR: &str = "its floor: the least that bytes and operations take";

/// A name in the legend behind its swatch.
struct Entry<'a> {
    name: &'a str,
    /// None for the floor.
    line: Option<&'a Line>,
    at: (i32, i32),
}

impl Entry<'_> {
    /// Pixels up to the next entry. Letters of 13 pixels are about seven wide, whichever the font.
    fn width(&self) -> i32 {
        SWATCH + 5 + 7 * self.name.chars().count() as i32 + 18
    }

    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let (x, y) = self.at;
        let swatch = [(x, y), (x + SWATCH, y)];
        match self.line {
            Some(line) => {
                area.draw(&PathElement::new(swatch, line.stroke()))?;
                line.marker(area, (x + SWATCH / 2, y))?;
            }
            None => area.draw(&DashedPathElement::new(swatch, DASH, GAP, GREY.stroke_width(2)))?,
        }
        let style = font(13).pos(Pos::new(HPos::Left, VPos::Center));
        Ok(area.draw(&Text::new(self.name.to_string(), (x + SWATCH + 5, y), style))?)
    }
}

/// Letters of so many pixels. The backend divides by 1.24.
pub fn font(pixels: u32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", f64::from(pixels) * 1.24).into_font())
}

/// The range of `numbers`, by a factor wider at both ends.
fn widened(numbers: impl Iterator<Item = f64>, factor: f64) -> (f64, f64) {
    let positive = numbers.filter(|number| number.is_finite() && *number > 0.0);
    let (least, most) = positive.fold((f64::INFINITY, 0.0f64), |(least, most), it| (least.min(it), most.max(it)));
    if most > 0.0 { (least / factor, most * factor) } else { (0.1, 10.0) }
}

/// The ticks that leave room for their names on an axis of `width` pixels.
fn apart(ticks: &[(f64, String)], from: f64, to: f64, width: f64) -> Vec<(f64, String)> {
    let mut kept: Vec<(f64, String)> = Vec::new();
    let mut free = f64::NEG_INFINITY;
    for (x, name) in ticks {
        let (middle, half) = ((x / from).ln() / (to / from).ln() * width, name.chars().count() as f64 * 4.0);
        if middle - half >= free {
            kept.push((*x, name.clone()));
            free = middle + half + 6.0;
        }
    }
    kept
}

/// Round numbers between `from` and `to` that leave room for their names on a logarithmic axis of `height` pixels: as many of each
/// power of ten as there is room for, or fewer powers.
fn decades(from: f64, to: f64, height: f64) -> Vec<f64> {
    let (first, last) = (from.log10().floor() as i32, to.log10().ceil() as i32);
    let choose = |digits: &[u32], step: usize| -> Vec<f64> {
        let powers = (first..=last).filter(|power| power.rem_euclid(step as i32) == 0);
        let numbers = powers.flat_map(|power| digits.iter().map(move |digit| round(*digit, power)));
        numbers.filter(|number| (from..=to).contains(number)).collect()
    };
    let pixels = |pair: &[f64]| (pair[1] / pair[0]).ln() / (to / from).ln() * height;
    let choices = [
        (&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], 1),
        (&[1, 2, 3, 5, 7][..], 1),
        (&[1, 2, 5][..], 1),
        (&[1][..], 1),
        (&[1][..], 2),
        (&[1][..], 3),
    ];
    let ticks = choices.into_iter().map(|(digits, step)| choose(digits, step));
    ticks.into_iter().find(|ticks| ticks.windows(2).all(|pair| pixels(pair) >= ROOM)).unwrap_or_default()
}

/// Pixels from one tick's name to the next.
const ROOM: f64 = 20.0;

/// `digit` times a power of ten, the nearest number to it.
fn round(digit: u32, power: i32) -> f64 {
    let scale = 10f64.powi(power.abs());
    if power < 0 { f64::from(digit) / scale } else { f64::from(digit) * scale }
}

/// A tick's number: whole ones with commas.
pub fn number(number: f64) -> String {
    if number >= 1.0 { crate::numbers::grouped(number.round() as usize) } else { number.to_string() }
}

#[cfg(test)]
mod tests {
    use resvg::usvg::roxmltree::Document;
    use ultramem_versus::Design;

    use super::*;

    /// Latencies as they may turn out: dense flat, MoE rising early, the memories apart, all proportional to the batch at the end.
    pub fn made_up() -> Chart {
        let batches = [1.0f64, 4.0, 16.0, 64.0, 256.0, 1024.0];
        let mut panels = vec![
            Panel { y_title: "latency of a step (ms)".into(), lines: Vec::new() },
            Panel { y_title: "bytes moved per step (MB)".into(), lines: Vec::new() },
        ];
        for (at, design) in Design::ALL.into_iter().enumerate() {
            let line = |role| Line::new(design.name(), look::of(design), role);
            let (mut measured, mut floor, mut bytes) = (line(Role::Measured), line(Role::Floor), line(Role::Measured));
            for batch in batches {
                let grown: f64 = if design == Design::Moe { batch.min(16.0) * 0.7 } else { 0.2 * at as f64 };
                let ms = 3.0 + grown + batch * 0.4;
                measured.points.push(Point { x: batch, y: ms, lower: ms * 0.95, upper: ms * 1.1 });
                floor.points.push(Point::at(batch, ms / 2.5));
                bytes.points.push(Point::at(batch, 30.0 + grown * 25.0 + batch * 0.1));
            }
            panels[0].lines.extend([floor, measured]);
            panels[1].lines.push(bytes);
        }
        Chart {
            title: "Latency of a step over batch, at equal budgets".into(),
            device: "llvmpipe (LLVM 15.0.6, 256 bits); wgpu, Vulkan, llvmpipe Mesa 22.3.6 (LLVM 15.0.6); f32".into(),
            x_title: "batch (sequences)".into(),
            ticks: batches.map(|batch| (batch, number(batch))).into(),
            panels,
        }
    }

    fn texts(svg: &str) -> Vec<String> {
        let document = Document::parse(svg).expect("it is XML");
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        texts.filter_map(|node| node.text()).map(|text| text.trim().to_string()).collect()
    }

    #[test]
    fn every_contestant_tick_and_title_is_there() {
        let svg = made_up().svg().expect("it can be drawn");
        let texts = texts(&svg);
        for design in Design::ALL {
            assert!(texts.iter().any(|text| text == design.name()), "{} is not in {texts:?}", design.name());
        }
        for name in ["latency of a step (ms)", "bytes moved per step (MB)", "batch (sequences)", "1,024", "1", "16"] {
            assert!(texts.iter().any(|text| text == name), "{name} is not in {texts:?}");
        }
        if let Some(folder) = std::env::var_os("ULTRAMEM_PICTURES") {
            std::fs::write(std::path::Path::new(&folder).join("made-up.svg"), &svg).expect("the folder is there");
        }
    }

    #[test]
    fn colours_tell_designs_apart() {
        for (at, design) in Design::ALL.into_iter().enumerate() {
            for other in &Design::ALL[..at] {
                let (Look(colour, marker), Look(others, other_marker)) = (look::of(design), look::of(*other));
                assert!(colour != others && marker != other_marker, "{design:?} looks like {other:?}");
            }
        }
    }

    #[test]
    fn one_place_and_no_place_can_be_drawn() {
        let mut chart = made_up();
        for keep in [1, 0] {
            chart.panels.iter_mut().flat_map(|panel| &mut panel.lines).for_each(|line| line.points.truncate(keep));
            assert!(!texts(&chart.svg().expect("it can be drawn")).is_empty());
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(decades(1.0, 120.0, 200.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(decades(2.1, 7.9, 200.0), [3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(decades(100.0, 1800.0, 290.0), [100.0, 200.0, 300.0, 500.0, 700.0, 1000.0]);
        assert_eq!(decades(0.04, 2000.0, 200.0), [0.1, 1.0, 10.0, 100.0, 1000.0]);
        assert_eq!((number(0.05), number(2000.0)), ("0.05".into(), "2,000".into()));
        let ticks = [1.0, 1.1, 64.0].map(|x| (x, number(x)));
        assert_eq!(apart(&ticks, 1.0, 64.0, 300.0).len(), 2);
    }
}
