//! Plots as SVG.

use std::path::Path;

use plotters::prelude::*;

/// Lines over a logarithmic x axis.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    /// The file's name, without `.svg`.
    pub(crate) name: String,
    /// What it shows.
    pub(crate) title: String,
    /// The x axis.
    pub(crate) x: String,
    /// The y axis, logarithmic too.
    pub(crate) y: String,
    /// Lines: a name, points in order of x.
    pub(crate) lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// Colours that stay apart for colour-blind readers (Okabe and Ito: Color universal design, 2008), without yellow.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(0, 0, 0),
];

/// Pixels on the right, for the lines' names.
const NAMES_WIDTH: i32 = 220;

/// The smallest value that is drawn: times below it are nothing on this scale.
const Y_LEAST: f64 = 1.0;

impl Plot {
    /// Writes the plot into a folder.
    ///
    /// # Errors
    /// It has no points, or the file can't be written.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), String> {
        let path = folder.join(format!("{}.svg", self.name));
        self.draw(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn draw(&self, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.lines.iter().flat_map(|(_, points)| points.iter().copied());
        let (mut left, mut right, mut top) = (f64::MAX, f64::MIN, 10.0 * Y_LEAST);
        for (x, y) in points() {
            (left, right, top) = (left.min(x), right.max(x), f64::max(top, y));
        }
        if left >= right {
            return Err("a plot needs two points".into());
        }
        let root = SVGBackend::new(path, (860, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, ("sans-serif", 18))
            .margin(10)
            .margin_right(NAMES_WIDTH)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d((left..right).log_scale(), (Y_LEAST..top * 1.5).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .light_line_style(BLACK.mix(0.06))
            .bold_line_style(BLACK.mix(0.14))
            .label_style(("sans-serif", 13))
            .draw()?;
        // Names stand beside the ends of their lines, moved apart where they would overlap.
        let mut ends = Vec::new();
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (x, y.max(Y_LEAST))).collect();
            let width = if index == 0 { 3 } else { 2 };
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(width)))?;
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            if let Some(&end) = points.last() {
                let (x, y) = chart.backend_coord(&end);
                ends.push((y, x, name, colour));
            }
        }
        ends.sort_by_key(|&(y, ..)| y);
        let (edge, _) = chart.backend_coord(&(right, Y_LEAST));
        let mut free = 34;
        for (y, x, name, colour) in ends {
            let at = y.max(free);
            free = at + 16;
            if x == edge {
                root.draw(&PathElement::new([(x + 4, y), (edge + 16, at)], colour.mix(0.5)))?;
            }
            root.draw(&Text::new(
                name.as_str(),
                (edge + 20, at - 7),
                ("sans-serif", 14).into_font().color(&colour),
            ))?;
        }
        root.present()?;
        Ok(())
    }
}

/// 1000 as `1k`.
fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{}M", (value / 1e5).round() / 10.0),
        value if value >= 1e3 => format!("{}k", (value / 1e2).round() / 10.0),
        value => format!("{}", (value * 10.0).round() / 10.0),
    }
}
