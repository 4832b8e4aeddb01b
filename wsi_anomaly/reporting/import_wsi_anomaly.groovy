/*
 * Import what wsi-anomaly found into the open image, or into every image of a project ("Run for project").
 * For QuPath 0.5 and later.
 *
 * By hand: open this script in QuPath's script editor, run it, choose the folder of the results.
 * For a project: name that folder below, else QuPath asks for it again at every image.
 * Without windows: QuPath script -p project.qpproj --args RESULTS_FOLDER --save import_wsi_anomaly.groovy
 *
 * It takes the tiles and regions whose file names this image, moves them if the image was opened with --no-crop,
 * removes what an earlier import of the same detector left, adds them, locks the regions and shows the z-scores.
 *
 * Tested against stand-ins for QuPath's classes only. Untested: the folder dialog, SHOW_MAP, the command line, and
 * images rotated on import by 180 degrees, which keep their size and so cannot be told apart (others are refused).
 */
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import com.google.gson.stream.JsonReader
import java.awt.geom.AffineTransform
import java.util.zip.GZIPInputStream
import qupath.lib.color.ColorMaps
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import static qupath.lib.scripting.QP.*

RESULTS = null              // the folder of the results; null asks
SHOW_MAP = true             // colour the tiles by z-score after the import
MEASUREMENT = "anomaly z"
DETECTOR = "wsi_anomaly detector"
LOWEST_Z = 0
HIGHEST_Z = 8

def named = args ? args[0] : RESULTS
def folder = named ? new File(named) : chooseFolder()
if (folder == null)
    return
def server = getCurrentServer()
def found = resultFiles(folder).collectEntries { [it, provenance(it)] }.findAll { it.value && isOf(it.value, server) }
if (found.isEmpty()) {
    println "wsi-anomaly: nothing in ${folder} belongs to ${server.getMetadata().getName()}"
    return
}

// Everything is read and checked before anything of the image changes.
def imported = found.collectMany { file, origin ->
    def shift = shiftFor(origin, server)
    PathIO.readObjects(file).collect { PathObjectTools.transformObject(it, shift, true, false) }
}
def detectors = found.values().collect { it.get("detector").getAsString() } as Set
def ids = imported.collect { it.getID() } as Set
def earlier = getCurrentHierarchy().getAllObjects(false).findAll { it.getID() in ids || it.getMetadata().get(DETECTOR) in detectors }
removeObjects(earlier, true)
addObjects(imported)
imported.findAll { it.isAnnotation() }.each { it.setLocked(true) }
fireHierarchyUpdate()
println "wsi-anomaly: ${imported.size()} objects imported into ${server.getMetadata().getName()}"
if (SHOW_MAP && !args)
    showMap()


/** The GeoJSON files below a folder. */
def resultFiles(File folder) {
    def files = []
    folder.eachFileRecurse(groovy.io.FileType.FILES) { files << it }
    return files.findAll { it.name ==~ /.+\.(tiles|regions)(\.\d+)?\.geojson(\.gz)?/ }.sort()
}

/** Where a file comes from: its member "wsi_anomaly", which stands before the features; null if it has none. */
JsonObject provenance(File file) {
    file.withInputStream { raw ->
        def stream = file.name.endsWith(".gz") ? new GZIPInputStream(raw) : raw
        def reader = new JsonReader(new InputStreamReader(stream, "UTF-8"))
        reader.beginObject()
        while (reader.hasNext()) {
            def name = reader.nextName()
            if (name == "wsi_anomaly")
                return JsonParser.parseReader(reader).getAsJsonObject()
            if (name == "features")
                return null
            reader.skipValue()
        }
        return null
    }
}

/** True if the objects were made for this image: by the name of its file, else by the name of the image. */
boolean isOf(JsonObject origin, server) {
    def slide = origin.get("slide").getAsString()
    def files = server.getURIs().collect { new File(it.getPath() ?: "").name }
    return slide in files || server.getMetadata().getName() == slide
}

/** From the frame of the file to that of the image, which depends on whether QuPath crops the slide to its bounds. */
AffineTransform shiftFor(JsonObject origin, server) {
    def size = [server.getWidth(), server.getHeight()]
    def bounds = origin.getAsJsonArray("bounds").collect { it.getAsInt() }
    def whole = origin.getAsJsonArray("level0_size").collect { it.getAsInt() }
    if (size == bounds[2..3])
        return new AffineTransform()
    if (size == whole)
        return AffineTransform.getTranslateInstance(bounds[0], bounds[1])
    throw new IllegalStateException("wsi-anomaly: the image is ${size} pixels, the objects are for ${bounds[2..3]} " +
            "(cropped) or ${whole}. Was it rotated, or is it another series of the file? Nothing was imported.")
}

/** Loaded here only, so that the script also runs where QuPath has no windows. */
def chooseFolder() {
    return Class.forName("qupath.fx.dialogs.FileChoosers").promptForDirectory("Results of wsi-anomaly", null)
}

/** What "Measure, Show measurement maps" does. */
def showMap() {
    def viewer = Class.forName("qupath.lib.gui.QuPathGUI").getInstance()?.getViewer()
    if (viewer == null)
        return
    def mapper = Class.forName("qupath.lib.gui.tools.MeasurementMapper")
            .newInstance(ColorMaps.getDefaultColorMap(), MEASUREMENT, getDetectionObjects())
    mapper.setDisplayMinValue(LOWEST_Z)
    mapper.setDisplayMaxValue(HIGHEST_Z)
    Class.forName("javafx.application.Platform").runLater {
        viewer.getOverlayOptions().setFillDetections(true)
        viewer.getOverlayOptions().setMeasurementMapper(mapper)
    }
}
